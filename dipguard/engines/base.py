"""What an engine is, and which one a fit gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dipguard.checks import check_choice
from dipguard.networks import StackedSkipNet

ENGINES = ("auto", "torch", "native")
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
        """One pass for z [B, input_depth, H, W]."""


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


def make_engine(name: str, net: StackedSkipNet, given: Tensor, *, steps: int) -> Engine:
    """The engine of a fit.

    Args:
        name: ``torch``; ``native`` (C++, CPU only, compiled on first use); or ``auto``: native where it can run, except
            for fits of fewer than 100 steps. Results of the two differ by rounding, which Adam amplifies.
        net: The stack, on the device that it is fitted on.
        given: x0, [B, 3, H, W], in the network's dtype.
        steps: Length of the fit.

    Raises:
        ValueError: Unknown name, or ``native`` where it cannot run.
    """
    check_choice(name, ENGINES, name="engine")
    if name == "torch" or (name == "auto" and (given.device.type != "cpu" or steps < SHORT)):
        return TorchEngine(net, given)
    problem = native_problem(net, given)
    if problem is None:
        from dipguard.engines.native import NativeEngine

        return NativeEngine(net, given)
    if name == "native":
        raise ValueError(f"`engine` 'native' cannot be used here: {problem}")
    return TorchEngine(net, given)


def number_of_threads() -> int:
    """Threads that torch may use."""
    return torch.get_num_threads()
