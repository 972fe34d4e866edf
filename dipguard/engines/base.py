"""What an engine is, and which one a fit gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dipguard.checks import check_choice
from dipguard.networks import StackedSkipNet
from dipguard.networks.unet import Scale

ENGINES = ("auto", "torch", "native", "cuda_graph")
SHORT = 100
"""Steps below which ``auto`` does not compile anything: some seconds, once a machine."""


class Step(NamedTuple):
    """One pass of all B networks (Eq. 2).

    Attributes:
        loss: Sum over images of the mean squared error, so that no image's gradient depends on B; its ``backward()``
            gives the engine's parameters their gradients.
        reconstructions: [B, 3, H, W], detached.
        errors: Mean squared error of each image, [B], detached.
    """

    loss: Tensor
    reconstructions: Tensor
    errors: Tensor


class Engine(ABC):
    """Computes the fit step of a stack.

    Made on the device that the network stands on, before the optimiser: its parameters are what is optimised. The
    network's own parameters follow them.
    """

    name: str

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser updates."""

    @abstractmethod
    def step(self, z: Tensor) -> Step:
        """One pass for z [B, input_depth, H, W]; z may require a gradient where the engine was made to give one."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these images alone, int64 [B']; the parameters are the same objects, with B' rows.

        What an optimiser holds of them is its owner's to cut (:func:`kept_rows`).
        """
        raise NotImplementedError(f"the {self.name} engine cannot let go of a part of its images")


class TorchEngine(Engine):
    """Torch's operations and autograd: one grouped convolution a layer; every device, every network."""

    name = "torch"

    def __init__(self, net: StackedSkipNet, given: Tensor) -> None:
        self.net = net
        self.given = given
        net.set_layout(channels_last=given.device.type == "cpu")

    def parameters(self) -> list[nn.Parameter]:
        """The network's own."""
        return list(self.net.parameters())

    def step(self, z: Tensor) -> Step:
        """See :meth:`Engine.step`."""
        x = self.net(z)
        errors = (x - self.given).square().flatten(1).mean(dim=1)
        return Step(errors.sum(), x.detach(), errors.detach())

    def keep(self, rows: Tensor) -> None:
        """See :meth:`Engine.keep`."""
        self.given = self.given[rows]
        for parameter in self.net.parameters():
            parameter.grad = None
            parameter.data = kept_rows(parameter.data, rows)
        resize(self.net, len(rows))


def kept_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Rows [B'] of values [B, ...], laid out in memory as they were: a fused Adam takes that for granted."""
    return torch.empty_like(values[: len(rows)]).copy_(values[rows])


def resize(net: StackedSkipNet, images: int) -> None:
    """Tell a network how many images its parameters now hold."""
    for module in net.modules():
        if isinstance(module, Scale):
            module.stack = images
    net.stack_size = images


def native_problem(net: StackedSkipNet, given: Tensor) -> str | None:
    """Why the native engine cannot fit this, or None; compiles it where that has not been done yet."""
    from dipguard.engines.native import NativeEngine
    from dipguard.engines.native_build import BuildError
    from dipguard.engines.native_plan import UnsupportedError

    try:
        NativeEngine.check(net, given)
    except (BuildError, UnsupportedError) as error:
        return str(error)
    return None


def make_engine(name: str, net: StackedSkipNet, given: Tensor, *, steps: int, z_gradient: bool = False) -> Engine:
    """The engine of a fit.

    Args:
        name: ``torch``; ``native`` (C++, CPU only, compiled on first use); ``cuda_graph`` (NVIDIA GPUs; written, not
            yet run on one); or ``auto``: native where it can run, except for fits of fewer than 100 steps, else torch.
            Their results differ by rounding, which Adam amplifies.
        net: The stack, on the device that it is fitted on.
        given: x0, [B, 3, H, W], in the network's dtype.
        steps: Length of the fit.
        z_gradient: z is optimised too: the loss's ``backward()`` must give it a gradient.

    Raises:
        ValueError: Unknown name, or an engine that cannot run here.
    """
    check_choice(name, ENGINES, name="engine")
    if name == "cuda_graph":
        if given.device.type != "cuda":
            raise ValueError(f"`engine` 'cuda_graph' needs an NVIDIA GPU, got a fit on {given.device.type}")
        from dipguard.engines.graph_engine import CudaGraphEngine

        return CudaGraphEngine(net, given, z_gradient=z_gradient)
    if name == "torch" or (name == "auto" and (given.device.type != "cpu" or steps < SHORT)):
        return TorchEngine(net, given)
    problem = native_problem(net, given)
    if problem is None:
        from dipguard.engines.native import NativeEngine

        return NativeEngine(net, given, z_gradient=z_gradient)
    if name == "native":
        raise ValueError(f"`engine` 'native' cannot be used here: {problem}")
    return TorchEngine(net, given)
