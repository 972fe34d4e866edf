"""Engines: what computes the forward and backward pass of a fit step for a stack."""

from __future__ import annotations

from torch import Tensor

from dipguard.checks import check_choice
from dipguard.engines.base import ENGINES, SHORT, Engine, Step, TorchEngine
from dipguard.engines.cuda_graph import CudaGraphEngine
from dipguard.engines.native import NativeEngine
from dipguard.engines.native_build import BuildError
from dipguard.engines.native_plan import UnsupportedError
from dipguard.engines.precision import PRECISIONS
from dipguard.networks import StackedSkipNet

__all__ = ["ENGINES", "PRECISIONS", "SHORT", "Engine", "Step", "TorchEngine", "check_matmul_precision", "make_engine"]


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
    z_gradient: bool = False,
    matmul_precision: str = "float32",
    differentiable: bool = False,
) -> Engine:
    """The engine of a fit.

    Args:
        name: ``torch``; ``native`` (C++, CPU only, compiled on first use); ``cuda_graph`` (NVIDIA GPUs); or ``auto``:
            native where it can run, except for fits of fewer than 100 steps, else torch. The results of engines differ
            by rounding, which Adam amplifies.
        net: The stack, on the device of the fit.
        given: x0, [B, 3, H, W], in the network's dtype.
        steps: Length of the fit.
        z_gradient: z is optimised too: the loss's ``backward()`` must give it a gradient.
        matmul_precision: ``float32``, or ``tf32`` or ``bfloat16`` with the engines ``torch`` and ``cuda_graph``
            (:mod:`dipguard.engines.precision`).
        differentiable: Gradients must flow through the reconstructions, because the caller adds a term to the loss
            that depends on them. ``auto`` is then torch.

    Raises:
        ValueError: Unknown name or precision, or an engine that cannot run here or cannot do what is asked.
    """
    check_matmul_precision(matmul_precision, engine=name)
    if differentiable and name not in ("auto", "torch"):
        raise ValueError(
            f"`engine` {name!r} has no gradients through the reconstructions, which a loss with further terms needs; "
            "use 'torch' or 'auto'"
        )
    if differentiable and matmul_precision != "float32":
        raise ValueError(
            f"`matmul_precision` {matmul_precision!r} has no gradients through the reconstructions, which a loss with "
            "further terms needs; use 'float32'"
        )
    if name == "cuda_graph":
        if given.device.type != "cuda":
            raise ValueError(f"`engine` 'cuda_graph' needs an NVIDIA GPU, got a fit on {given.device.type}")
        return CudaGraphEngine(net, given, z_gradient=z_gradient, matmul_precision=matmul_precision)
    if matmul_precision != "float32":
        return CudaGraphEngine(
            net,
            given,
            z_gradient=z_gradient,
            matmul_precision=matmul_precision,
            convolutions=("grouped",),
            normalisations=("torch",),
            capture=False,
        )
    short = name == "auto" and (given.device.type != "cpu" or steps < SHORT)
    if name == "torch" or short or differentiable:
        return TorchEngine(net, given)
    try:
        return NativeEngine(net, given, z_gradient=z_gradient)
    except (BuildError, UnsupportedError) as problem:
        if name == "native":
            raise ValueError(f"`engine` 'native' cannot be used here: {problem}") from problem
        return TorchEngine(net, given)
