"""What all engines promise, the GPU's beside torch's (eagerly on a CPU), and which engine a fit gets."""

import pytest
import torch
from torch import Tensor

from dipguard.engines import Engine, TorchEngine, make_engine
from dipguard.engines.base import fit_errors
from dipguard.engines.cuda_graph import CudaGraphEngine
from dipguard.networks import build
from tests.fit.conftest import NATIVE

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


def fit(engine: Engine, z: Tensor, *, steps: int) -> list[Tensor]:
    """Reconstructions, errors and losses of a few steps of SGD; then the weights."""
    seen = []
    for _ in range(steps):
        step = engine.step(z)
        step.loss.backward()
        seen += [step.reconstructions.detach(), step.errors, step.loss.detach()]
        with torch.no_grad():
            for tensor in [*engine.parameters(), *([z] if z.requires_grad else [])]:
                tensor -= 0.1 * tensor.grad
                tensor.grad = None
    return seen + [p.detach() for p in engine.parameters()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("z_gradient", [False, True])
@pytest.mark.parametrize("dead", [None, [0.0, 0.1, 0.4]])
def test_the_graph_s_engine_does_what_torch_s_does(dead: list[float] | None, z_gradient: bool, device: str) -> None:
    tolerance = None if dead is None else torch.tensor(dead, dtype=torch.float64, device=device)
    given, z = torch.rand(3, 3, 17, 18, dtype=torch.float64), torch.rand(3, 4, 17, 18, dtype=torch.float64)
    results = []
    for kind in (TorchEngine, CudaGraphEngine):
        net = build("small", stack_size=3, dtype=torch.float64).to(device)
        options = {} if kind is TorchEngine else {"z_gradient": z_gradient, "capture": device == "cuda"}
        engine = kind(net, given.to(device), tolerance=tolerance, **options)
        results.append(fit(engine, z.to(device, copy=True).requires_grad_(z_gradient), steps=4))
    # All are compared after the last step: none may have been overwritten by a later one.
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_errors_within_the_tolerance_cost_nothing_and_others_what_exceeds_it() -> None:
    x, given, tolerance = torch.rand(3, 3, 4, 5), torch.rand(3, 3, 4, 5), torch.tensor([0.0, 0.2, 2.0])
    errors = fit_errors(x, given, tolerance).tolist()
    for b, most in enumerate(tolerance.tolist()):
        each = [max(abs(float(d)) - most, 0.0) ** 2 for d in (x[b] - given[b]).flatten()]
        assert errors[b] == pytest.approx(sum(each) / len(each), rel=1e-5)
    assert errors[2] == 0 < errors[1] < errors[0] == pytest.approx(float((x[0] - given[0]).square().mean()))
    assert torch.equal(fit_errors(x, given, None), fit_errors(x, given, torch.zeros(3)))


@pytest.mark.parametrize("name", ["torch", "graph", pytest.param("native", marks=NATIVE)])
def test_gradients_flow_through_the_reconstructions_of_torch_s_engine_alone(name: str) -> None:
    net, given, z = build("small", stack_size=2), torch.rand(2, 3, 16, 16), torch.rand(2, 4, 16, 16)
    graph = name == "graph"
    engine = CudaGraphEngine(net, given, capture=False) if graph else make_engine(name, net, given, steps=10)
    step = engine.step(z)
    assert step.reconstructions.requires_grad == (name == "torch")
    assert not step.errors.requires_grad
    if name == "torch":
        (step.loss + step.reconstructions.square().sum()).backward()
        added = [p.grad.clone() for p in engine.parameters()]
        for parameter in engine.parameters():
            parameter.grad = None
        engine.step(z).loss.backward()
        assert all(not torch.equal(a, p.grad) for a, p in zip(added, engine.parameters(), strict=True) if p.ndim == 5)


def test_a_differentiable_engine_is_torch_s_and_others_are_refused() -> None:
    about = {"net": build("small", stack_size=1), "given": torch.rand(1, 3, 16, 16), "steps": 1000}
    for name in ("auto", "torch"):
        assert isinstance(make_engine(name, **about, differentiable=True), TorchEngine)
    for name in ("native", "cuda_graph"):
        with pytest.raises(ValueError, match=f"`engine` '{name}' has no gradients through the reconstructions"):
            make_engine(name, **about, differentiable=True)
    with pytest.raises(ValueError, match="`matmul_precision` 'bfloat16' has no gradients through the reconstr"):
        make_engine("torch", **about, matmul_precision="bfloat16", differentiable=True)


@pytest.mark.parametrize(("name", "near"), [("float32", 0.0), ("tf32", 1e-6), ("bfloat16", 0.05)])
def test_precisions_of_torch_s_engine(name: str, near: float) -> None:
    given, z = torch.rand(2, 3, 16, 16), torch.rand(2, 4, 16, 16)
    right = make_engine("torch", build("small", stack_size=2), given, steps=10)
    ours = make_engine("torch", build("small", stack_size=2), given, steps=10, matmul_precision=name)
    assert ours.name == "torch"
    steps = right.step(z), ours.step(z)
    for step in steps:
        step.loss.backward()
    assert steps[1].reconstructions.dtype == torch.float32
    far = float((steps[1].reconstructions - steps[0].reconstructions).detach().abs().max())
    assert far <= near
    assert (far > 0) == (name == "bfloat16")
    for mine, theirs in zip(ours.parameters(), right.parameters(), strict=True):
        assert mine.grad.dtype == mine.dtype == torch.float32
        # Behind a dozen roundings to 8 bits a gradient is right in its direction, not in its digits.
        assert (mine.grad - theirs.grad).norm() <= 10 * near * max(theirs.grad.norm(), 1e-3)


@pytest.mark.parametrize(
    ("engine", "precision", "message"),
    [
        ("auto", "bfloat16", "`matmul_precision` 'bfloat16' needs `engine` 'torch' or 'cuda_graph', got 'auto'"),
        ("native", "tf32", "`matmul_precision` 'tf32' needs `engine` 'torch' or 'cuda_graph', got 'native'"),
        ("torch", "half", "`matmul_precision` must be one of float32, tf32, bfloat16, got 'half'"),
        ("cuda_graph", "float32", "`engine` 'cuda_graph' needs an NVIDIA GPU, got a fit on cpu"),
    ],
)
def test_what_an_engine_does_not_have_is_refused(engine: str, precision: str, message: str) -> None:
    net, given = build("small", stack_size=1), torch.rand(1, 3, 16, 16)
    with pytest.raises(ValueError, match=message):
        make_engine(engine, net, given, steps=10, matmul_precision=precision)
