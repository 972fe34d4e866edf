"""The GPU's engine beside torch's: run eagerly on a CPU, and as a graph where there is a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from dipguard.engines import Engine, TorchEngine, make_engine
from dipguard.engines.graph_engine import CudaGraphEngine
from dipguard.engines.native import NativeEngine
from dipguard.engines.native_build import compiler
from dipguard.fit import FitOptions
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


@pytest.mark.parametrize("name", ["torch", "graph", "native"])
def test_images_that_join_are_computed_as_if_they_had_been_there(name: str) -> None:
    if name == "native" and compiler() is None:
        pytest.skip("no C++ compiler")
    given, z = torch.rand(3, 3, 17, 18, dtype=torch.float64), torch.rand(3, 4, 17, 18, dtype=torch.float64)
    make = {"torch": TorchEngine, "native": NativeEngine, "graph": partial(CudaGraphEngine, capture=False)}[name]
    whole = make(build("small", stack_size=3, dtype=torch.float64), given)
    part = make(build("small", stack_size=1, dtype=torch.float64), given[:1])
    with torch.no_grad():
        part.join(build("small", stack_size=2, indices=(1, 2), dtype=torch.float64), given[1:])
        part.keep(torch.tensor([0, 2]))
        part.join(build("small", stack_size=1, indices=(1,), dtype=torch.float64), given[1:2])
    order = [0, 2, 1]
    steps = whole.step(z), part.step(z[order])
    for step in steps:
        step.loss.backward()
    torch.testing.assert_close(steps[1].reconstructions, steps[0].reconstructions[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(steps[1].errors, steps[0].errors[order], rtol=0, atol=1e-12)
    for mine, theirs in zip(part.parameters(), whole.parameters(), strict=True):
        assert mine.stride() == theirs.stride()
        torch.testing.assert_close(mine.data, theirs.data[order], rtol=0, atol=0)
        torch.testing.assert_close(mine.grad, theirs.grad[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("products", "near"), [("float32", 0.0), ("tf32", 1e-6), ("bfloat16", 0.05)])
def test_precisions_of_torch_s_engine(products: str, near: float) -> None:
    given, z = torch.rand(2, 3, 16, 16), torch.rand(2, 4, 16, 16)
    right = make_engine("torch", build("small", stack_size=2), given, steps=10)
    ours = make_engine("torch", build("small", stack_size=2), given, steps=10, products=products)
    assert ours.name == "torch"
    steps = right.step(z), ours.step(z)
    for step in steps:
        step.loss.backward()
    far = float((steps[1].reconstructions - steps[0].reconstructions).abs().max())
    assert far <= near
    assert (far > 0) == (products == "bfloat16")
    for mine, theirs in zip(ours.parameters(), right.parameters(), strict=True):
        assert mine.grad.dtype == mine.dtype == torch.float32
        # Behind a dozen roundings to 8 bits a gradient is right in its direction, not in its digits.
        assert (mine.grad - theirs.grad).norm() <= 10 * near * max(theirs.grad.norm(), 1e-3)


def test_precisions_that_an_engine_does_not_have_are_refused() -> None:
    net, given = build("small", stack_size=1), torch.rand(1, 3, 16, 16)
    with pytest.raises(ValueError, match="`precision` 'bfloat16' needs `engine` 'torch' or 'cuda_graph', got 'auto'"):
        make_engine("auto", net, given, steps=10, products="bfloat16")
    with pytest.raises(ValueError, match="`precision` 'tf32' needs `engine` 'torch' or 'cuda_graph', got 'native'"):
        FitOptions(engine="native", precision="tf32")
    with pytest.raises(ValueError, match="`precision` 'tf32' needs `dtype` 'float32', got 'float64'"):
        FitOptions(engine="torch", precision="tf32", dtype="float64")
    with pytest.raises(ValueError, match="`precision` must be one of float32, tf32, bfloat16, got 'half'"):
        FitOptions(precision="half")
    assert "precision" not in FitOptions().as_settings()
    assert FitOptions(engine="torch", precision="tf32").as_settings()["precision"] == "tf32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without CUDA says")
def test_without_cuda_it_is_refused() -> None:
    with pytest.raises(RuntimeError, match="a CUDA graph needs images and network on a CUDA device, got cpu"):
        CudaGraphEngine(build("small", stack_size=1), torch.rand(1, 3, 17, 17))
