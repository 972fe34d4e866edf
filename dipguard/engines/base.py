"""The interface of an engine, and the engine on torch's own operations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from dipguard.networks import StackedSkipNet

ENGINES = ("auto", "torch", "native", "cuda_graph")
SHORT = 100
"""Fits of fewer steps never compile the native engine under ``auto``: compiling takes seconds, once per machine."""


class Step(NamedTuple):
    """One pass of all B networks (Eq. 2).

    Attributes:
        loss: Sum over images of the mean squared error, so that no image's gradient depends on B; its ``backward()``
            gives the engine's parameters their gradients.
        reconstructions: [B, 3, H, W]; part of the autograd graph where the engine is differentiable, so detach them
            before keeping them.
        errors: Mean squared error of each image, [B], detached.
    """

    loss: Tensor
    reconstructions: Tensor
    errors: Tensor


class Engine(ABC):
    """Computes the fit step of a stack.

    Create it on the network's device and before the optimiser, which updates the engine's parameters. The network's own
    parameters follow them.

    Attributes:
        name: ``torch``, ``native`` or ``cuda_graph``.
        differentiable: Whether gradients flow through the reconstructions of a step. If not, only ``loss`` may be
            differentiated, and nothing that depends on the reconstructions can be added to it.
    """

    name: str
    differentiable: ClassVar[bool] = False

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser updates."""

    @abstractmethod
    def step(self, z: Tensor) -> Step:
        """One pass for z [B, input_depth, H, W], which may require a gradient if the engine was made to give it one."""


class TorchEngine(Engine):
    """Torch's operations and autograd, one grouped convolution per layer; runs every network on every device.

    Args:
        net: The stack.
        given: x0, [B, 3, H, W], in the network's dtype.
    """

    name = "torch"
    differentiable = True

    def __init__(self, net: StackedSkipNet, given: Tensor) -> None:
        self.net = net
        self.given = given
        net.set_layout(channels_last=given.device.type == "cpu")

    def parameters(self) -> list[nn.Parameter]:
        """The network's own."""
        return list(self.net.parameters())

    def step(self, z: Tensor) -> Step:
        """One pass; the backward pass is autograd's."""
        x = self.net(z)
        errors = (x - self.given).square().flatten(1).mean(dim=1)
        return Step(errors.sum(), x, errors.detach())
