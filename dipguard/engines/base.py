"""What an engine is, the engine on torch's own operations, and which engine a fit gets."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dipguard.checks import check_choice
from dipguard.networks import StackedSkipNet
from dipguard.precision import PRECISIONS

_log = logging.getLogger(__name__)

ENGINES = ("auto", "torch", "native", "cuda_graph")
SHORT = 100
"""Fits of fewer steps are torch's under ``auto``: compiling or choosing another engine takes seconds."""


class Step(NamedTuple):
    """One pass of all B networks (Eq. 2)."""

    loss: Tensor  # sum of the images' errors; its backward() gives the engine's parameters their gradients
    reconstructions: Tensor  # [B, 3, H, W]; part of the autograd graph with torch's engine alone
    errors: Tensor  # error of each image (`fit_errors`), [B], detached


def fit_errors(x: Tensor, given: Tensor, tolerance: Tensor | None) -> Tensor:
    """Mean squared error of each image, [B], of x and x0 [B, 3, H, W].

    Of an image with a tolerance in ``tolerance`` [B], smaller errors of a pixel count as 0, and larger ones as what
    exceeds it.
    """
    difference = x - given
    if tolerance is not None:
        width = tolerance[:, None, None, None]
        difference = difference - difference.clamp(-width, width)
    return difference.square().flatten(1).mean(dim=1)


class Engine(ABC):
    """Computes the fit step of a stack.

    Create it on the network's device and before the optimiser, which updates the engine's parameters. The network's own
    parameters follow them.
    """

    name: str  # ``torch``, ``native`` or ``cuda_graph``
    net: StackedSkipNet

    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser updates."""
        return list(self.net.parameters())

    @abstractmethod
    def step(self, z: Tensor) -> Step:
        """One pass for z [B, input_depth, H, W], which may require a gradient if the engine was made to give it one."""


class TorchEngine(Engine):
    """Torch's operations and autograd, one grouped convolution per layer; runs every network on every device.

    ``given`` is x0, [B, 3, H, W], in the network's dtype, ``tolerance`` that of `fit_errors`.
    """

    name = "torch"

    def __init__(self, net: StackedSkipNet, given: Tensor, *, tolerance: Tensor | None = None) -> None:
        self.net = net
        self.given = given
        self.tolerance = tolerance
        net.set_layout(channels_last=given.device.type == "cpu")

    def step(self, z: Tensor) -> Step:
        """One pass; the backward pass is autograd's."""
        x = self.net(z)
        errors = fit_errors(x, self.given, self.tolerance)
        return Step(errors.sum(), x, errors.detach())


class HandOver(torch.autograd.Function):
    """The loss of a step whose gradients have been computed already: its backward pass hands them over.

    A factor on the loss is ignored on a GPU, because reading it would make the host wait in every step. ``handle`` is
    any scalar that requires a gradient.
    """

    @staticmethod
    def forward(ctx: Any, handle: Tensor, z: Tensor, loss: Tensor, *made: Any) -> Tensor:
        """A copy of the loss; ``made`` are parameters, their gradients, and z's gradient or None."""
        ctx.parameters, ctx.gradients, ctx.z_gradient = made
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Add to the parameters' gradients; returns z's."""
        factor = 1.0 if upstream[0].is_cuda else float(upstream[0])
        # Set, not returned: autograd would copy tensors that are referenced elsewhere.
        for parameter, gradient in zip(ctx.parameters, ctx.gradients, strict=True):
            if parameter.grad is gradient:  # it was set to zero in place, and this step's gradient with it
                raise RuntimeError("`optimizer_zero_grad` must set gradients to None, which is PyTorch's default")
            scaled = gradient if factor == 1 else gradient * factor
            parameter.grad = scaled if parameter.grad is None else parameter.grad + scaled
        return None, None if ctx.z_gradient is None else ctx.z_gradient * factor, None, None, None, None


def check_matmul_precision(matmul_precision: str, *, engine: str) -> None:
    """Raise ValueError unless both names are known and the engine has this precision."""
    check_choice(engine, ENGINES, name="engine")
    check_choice(matmul_precision, PRECISIONS, name="matmul_precision")
    if matmul_precision != "float32" and engine not in ("torch", "cuda_graph"):
        raise ValueError(
            f"`matmul_precision` {matmul_precision!r} needs `engine` 'torch' or 'cuda_graph', got {engine!r}"
        )


def make_engine(
    name: str,
    net: StackedSkipNet,
    given: Tensor,
    *,
    steps: int,
    tolerance: Tensor | None = None,
    z_gradient: bool = False,
    matmul_precision: str = "float32",
    differentiable: bool = False,
) -> Engine:
    """The engine of a fit of ``steps`` steps to ``given``, x0 [B, 3, H, W], on the network's device and in its dtype.

    ValueError for an unknown name or precision, or an engine that cannot run here or cannot do what is asked.

    Args:
        name: ``torch``; ``native`` (C++, CPU only, compiled on first use); ``cuda_graph`` (NVIDIA GPUs); or ``auto``:
            for fits of at least 100 steps native on a CPU, where it can run, and on an NVIDIA GPU the faster one of
            torch and cuda_graph (:func:`~dipguard.engines.cuda_graph.fastest_engine`); otherwise torch. The results of
            engines differ by rounding, which Adam amplifies.
        tolerance: Half widths of the loss's dead zones, [B], at least 0 (:class:`~dipguard.fit.FitOptions`).
        z_gradient: The loss's ``backward()`` must give z a gradient.
        matmul_precision: That of :func:`~dipguard.precision.precision`; ``tf32`` and ``bfloat16`` need the engine
            ``torch`` or ``cuda_graph``.
        differentiable: Gradients must flow through the reconstructions; ``auto`` is then torch.
    """
    from dipguard.engines.native import NativeEngine
    from dipguard.engines.native_build import BuildError
    from dipguard.engines.native_plan import UnsupportedError

    check_matmul_precision(matmul_precision, engine=name)
    rough, graph = matmul_precision != "float32", name == "cuda_graph"
    if differentiable and (rough or name not in ("torch", "auto")):
        what = f"`matmul_precision` {matmul_precision!r}" if rough else f"`engine` {name!r}"
        raise ValueError(
            f"{what} has no gradients through the reconstructions, which a loss with further terms needs; use "
            f"{'float32' if rough else 'torch or auto'}"
        )
    if graph and given.device.type != "cuda":
        raise ValueError(f"`engine` 'cuda_graph' needs an NVIDIA GPU, got a fit on {given.device.type}")
    if graph or rough:
        from dipguard.engines.cuda_graph import CudaGraphEngine

        plain: dict[str, Any] = {"convolutions": ("grouped",), "normalisations": ("torch",), "capture": False}
        options = {"z_gradient": z_gradient, "matmul_precision": matmul_precision, **({} if graph else plain)}
        return CudaGraphEngine(net, given, tolerance=tolerance, **options)
    device = given.device.type
    if name == "torch" or differentiable or (name == "auto" and (steps < SHORT or device not in ("cpu", "cuda"))):
        return TorchEngine(net, given, tolerance=tolerance)
    if name == "auto" and device == "cuda":
        from dipguard.engines.cuda_graph import fastest_engine

        return fastest_engine(net, given, tolerance=tolerance, z_gradient=z_gradient)
    try:
        return NativeEngine(net, given, tolerance=tolerance, z_gradient=z_gradient)
    except (BuildError, UnsupportedError) as problem:
        if name == "native":
            raise ValueError(f"`engine` 'native' cannot be used here: {problem}") from problem
        say_once(f"the engine 'native' cannot be used, torch's takes its place: {problem}")
        return TorchEngine(net, given, tolerance=tolerance)


@cache
def say_once(text: str, *, level: int = logging.WARNING) -> None:
    """Log a text, unless this process has logged it before."""
    _log.log(level, text)
