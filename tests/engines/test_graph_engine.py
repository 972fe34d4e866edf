"""The GPU's engine beside torch's: run eagerly on a CPU, and as a graph where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dipguard.engines import Engine, TorchEngine
from dipguard.engines.graph_engine import CudaGraphEngine
from dipguard.networks import build

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


def fit(engine: Engine, z: Tensor, *, steps: int, keep: list[int] | None = None) -> list[Tensor]:
    """Reconstructions, errors and losses of a few steps of SGD, some images let go in the middle; then the weights."""
    seen = []
    for t in range(steps):
        if keep is not None and t == steps // 2:
            rows = torch.tensor(keep, device=z.device)
            with torch.no_grad():
                engine.keep(rows)
            z = z.detach()[rows].requires_grad_(z.requires_grad)
        step = engine.step(z)
        step.loss.backward()
        seen += [step.reconstructions, step.errors, step.loss.detach()]
        with torch.no_grad():
            for tensor in [*engine.parameters(), *([z] if z.requires_grad else [])]:
                tensor -= 0.1 * tensor.grad
                tensor.grad = None
        del step  # torch's engine cannot let images go while somebody holds on to the last loss
    return seen + [p.detach() for p in engine.parameters()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("z_gradient", [False, True])
@pytest.mark.parametrize("keep", [None, [2, 0]])
def test_it_does_what_torch_s_engine_does(keep: list[int] | None, z_gradient: bool, device: str) -> None:
    given, z = torch.rand(3, 3, 17, 18, dtype=torch.float64), torch.rand(3, 4, 17, 18, dtype=torch.float64)
    results = []
    for kind in (TorchEngine, CudaGraphEngine):
        net = build("small", stack_size=3, dtype=torch.float64).to(device)
        options = {} if kind is TorchEngine else {"z_gradient": z_gradient, "capture": device == "cuda"}
        engine = kind(net, given.to(device), **options)
        results.append(fit(engine, z.to(device, copy=True).requires_grad_(z_gradient), steps=4, keep=keep))
    # All are compared after the last step: none may have been overwritten by a later one.
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without CUDA says")
def test_without_cuda_it_is_refused() -> None:
    with pytest.raises(RuntimeError, match="a CUDA graph needs images and network on a CUDA device, got cpu"):
        CudaGraphEngine(build("small", stack_size=1), torch.rand(1, 3, 17, 17))
