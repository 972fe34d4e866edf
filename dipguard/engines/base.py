"""What an engine is, and which one a fit gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dipguard.checks import check_choice
from dipguard.engines.precision import PRECISIONS
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

    def join(self, net: StackedSkipNet, given: Tensor) -> None:
        """Fit these images too, behind the others; the parameters are the same objects, with more rows.

        Args:
            net: Their networks, of the same kind; the engine takes the weights.
            given: [n, 3, H, W], in the dtype and on the device of the others.
        """
        raise NotImplementedError(f"the {self.name} engine cannot take more images")


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
        keep_networks(self.net, rows)

    def join(self, net: StackedSkipNet, given: Tensor) -> None:
        """See :meth:`Engine.join`."""
        self.given = torch.cat([self.given, given])
        join_networks(self.net, net)


def kept_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Rows [B'] of values [B, ...], laid out in memory as they were: a fused Adam takes that for granted."""
    return torch.empty_like(values[: len(rows)]).copy_(values[rows])


def joined_rows(values: Tensor, more: Tensor) -> Tensor:
    """Rows [B] and more rows [n], laid out in memory as the first are."""
    rows, inner = len(values), tuple(values.shape[1:])
    both = values.new_empty_strided((rows + len(more), *inner), values.stride())
    both[:rows], both[rows:] = values, more
    return both


def keep_networks(net: StackedSkipNet, rows: Tensor) -> None:
    """Cut a stack's parameters down to these rows."""
    for parameter in net.parameters():
        parameter.grad = None
        parameter.data = kept_rows(parameter.data, rows)
    resize(net, len(rows))


def join_networks(net: StackedSkipNet, more: StackedSkipNet) -> None:
    """Put more networks' parameters behind a stack's."""
    for parameter, other in zip(net.parameters(), more.parameters(), strict=True):
        parameter.grad = None
        parameter.data = joined_rows(parameter.data, other.data)
    resize(net, net.stack_size + more.stack_size)


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


def check_products(products: str, *, engine: str) -> None:
    """Raise ValueError unless both are known and the engine can multiply so."""
    check_choice(engine, ENGINES, name="engine")
    check_choice(products, PRECISIONS, name="precision")
    if products != "float32" and engine not in ("torch", "cuda_graph"):
        raise ValueError(f"`precision` {products!r} needs `engine` 'torch' or 'cuda_graph', got {engine!r}")


def make_engine(
    name: str,
    net: StackedSkipNet,
    given: Tensor,
    *,
    steps: int,
    z_gradient: bool = False,
    products: str = "float32",
) -> Engine:
    """The engine of a fit.

    Args:
        name: ``torch``; ``native`` (C++, CPU only, compiled on first use); ``cuda_graph`` (NVIDIA GPUs; written, not
            yet run on one); or ``auto``: native where it can run, except for fits of fewer than 100 steps, else torch.
            Their results differ by rounding, which Adam amplifies.
        net: The stack, on the device that it is fitted on.
        given: x0, [B, 3, H, W], in the network's dtype.
        steps: Length of the fit.
        z_gradient: z is optimised too: the loss's ``backward()`` must give it a gradient.
        products: ``float32``, or ``tf32`` or ``bfloat16`` for the engines ``torch`` and ``cuda_graph``
            (:mod:`dipguard.engines.precision`).

    Raises:
        ValueError: Unknown name or products, or an engine that cannot run here.
    """
    check_products(products, engine=name)
    if name == "cuda_graph":
        if given.device.type != "cuda":
            raise ValueError(f"`engine` 'cuda_graph' needs an NVIDIA GPU, got a fit on {given.device.type}")
        from dipguard.engines.graph_engine import CudaGraphEngine

        return CudaGraphEngine(net, given, z_gradient=z_gradient, products=products)
    if products != "float32":
        from dipguard.engines.graph_engine import CudaGraphEngine

        plain: dict[str, Any] = {"forms": ("grouped",), "norms": ("torch",), "capture": False}
        return CudaGraphEngine(net, given, z_gradient=z_gradient, products=products, **plain)
    if name == "torch" or (name == "auto" and (given.device.type != "cpu" or steps < SHORT)):
        return TorchEngine(net, given)
    problem = native_problem(net, given)
    if problem is None:
        from dipguard.engines.native import NativeEngine

        return NativeEngine(net, given, z_gradient=z_gradient)
    if name == "native":
        raise ValueError(f"`engine` 'native' cannot be used here: {problem}")
    return TorchEngine(net, given)
