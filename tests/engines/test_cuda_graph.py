"""The recorded step, run eagerly on a CPU, and as a graph where there is a GPU."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dipguard import MirrorGuard
from dipguard.engines import TorchEngine, cuda_graph, make_engine
from dipguard.engines.cuda_graph import CudaGraphEngine, _keep, engine_times, fastest_engine
from dipguard.engines.kernel_choice import use_kernels
from dipguard.networks import StackedSkipNet, build

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def problem(network="small", *, dtype=torch.float64, device="cpu") -> tuple[StackedSkipNet, Tensor, Tensor]:
    net = build(network, stack_size=3, seed=1, dtype=dtype).to(device)
    given, z = torch.rand(3, 3, 17, 18, dtype=dtype), torch.rand(3, 4, 17, 18, dtype=dtype) / 10
    return net, given.to(device), z.to(device)


def by_autograd(net: StackedSkipNet, given: Tensor, z: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    x = net(z)
    errors = torch.stack([torch.nn.functional.mse_loss(x[b], given[b]) for b in range(len(x))])
    net.zero_grad()
    errors.sum().backward()
    return x.detach(), errors.detach(), [p.grad for p in net.parameters()]


@pytest.mark.parametrize(
    ("mode", "network"), [(torch.enable_grad, "medium"), (torch.no_grad, "small"), (torch.inference_mode, "small")]
)
def test_the_step_is_autograd_s(network: str, mode: Any) -> None:
    net, given, z = problem(network)
    right = by_autograd(net, given, z)
    with mode():
        engine = CudaGraphEngine(net, given.clone(), capture=False)
        x, errors, gradients = engine.compute(z.clone())
    assert x.shape == given.shape
    assert errors.shape == (3,)
    assert not x.requires_grad
    for ours, theirs in zip((x, errors, *gradients), (*right[:2], *right[2]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_steps_follow_weights_and_z() -> None:
    net, given, z = problem()
    engine = CudaGraphEngine(net, given, capture=False)
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    for t in range(3):
        x, _, gradients = engine.compute(z + t)
        right = by_autograd(net, given, z + t)
        assert torch.equal(x, right[0])
        for ours, theirs in zip(gradients, right[2], strict=True):
            assert torch.equal(ours, theirs)
        optimiser.step()


@needs_cuda
@pytest.mark.parametrize("convolution", ["grouped", "matmul", "triton", "triton tf32x3"])
def test_a_graph_gives_what_eager_steps_give(convolution: str) -> None:
    results = []
    normalisation = "triton" if convolution.startswith("triton") else "torch"
    for capture in (True, False):
        torch.manual_seed(0)
        net, given, z = problem(device="cuda")
        kernels = {"convolutions": [convolution], "normalisations": [normalisation]}
        engine = CudaGraphEngine(net, given, capture=capture, **kernels)
        optimiser = torch.optim.Adam(net.parameters(), lr=0.01, fused=True)
        seen = []
        for t in range(5):
            x, errors, gradients = engine.compute(z + t / 10)
            seen += [x.clone(), errors.clone()]
            for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimiser.step()
        results.append(seen)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of measured engines, in a cache of the test's own."""
    monkeypatch.setenv("DIPGUARD_CACHE", str(tmp_path))
    monkeypatch.setattr("dipguard.engines.cuda_graph._TIMES", {})
    return tmp_path / "engines.json"


@pytest.mark.parametrize("z_gradient", [False, True])
def test_engines_are_measured_once_and_the_network_stays_as_it_was(z_gradient: bool, kept: Path) -> None:
    net, given, _ = problem()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    times = engine_times(net, given, z_gradient=z_gradient)
    assert sorted(times) == ["cuda_graph", "torch"]
    assert all(0 < seconds < 60 for seconds in times.values())
    assert engine_times(net, given, z_gradient=z_gradient) == times  # to the last digit: it was read
    assert list(json.loads(kept.read_text()).values()) == [times]
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert all(p.grad is None for p in net.parameters())


def test_an_engine_whose_gradients_always_lie_in_the_same_memory_is_measured(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, compute = {}, CudaGraphEngine.compute

    def replayed(self: CudaGraphEngine, z: Tensor) -> Any:
        return held.setdefault(self, compute(self, z))

    monkeypatch.setattr(CudaGraphEngine, "compute", replayed)
    assert engine_times(*problem()[:2])["cuda_graph"] < 60


@pytest.mark.parametrize("faster", ["torch", "cuda_graph"])
def test_the_faster_engine_is_taken(faster: str, kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    net, given, _ = problem()
    engine_times(net, given)
    (key,) = json.loads(kept.read_text())
    cuda_graph._TIMES.clear()
    kept.write_text(json.dumps({key: {"torch": 0.25, "cuda_graph": 0.25, faster: 0.125}}))
    with caplog.at_level("INFO", logger="dipguard"):
        engine = fastest_engine(net, given)
    assert isinstance(engine, TorchEngine if faster == "torch" else CudaGraphEngine)
    assert f"fits of 3 images at once: engine {faster} (a step with " in caplog.text
    assert f"{faster} 125.00 ms" in caplog.text


def test_each_network_size_and_stack_is_measured_on_its_own(kept: Path) -> None:
    for network, count in (("small", 3), ("small", 4), ("small", 5), ("medium", 3)):
        net = build(network, stack_size=count)
        for side in (16, 24) if count == 4 else (16,):
            engine_times(net, torch.rand(count, 3, side, side))
    assert len(json.loads(kept.read_text())) == 4  # stacks of 3 and 4 count as one size


def test_with_other_kernels_both_are_measured_again(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, given, _ = problem()
    engine_times(net, given)
    monkeypatch.setattr(cuda_graph, "_kernels_digest", lambda: "another")
    engine_times(net, given)
    assert len(json.loads(kept.read_text())) == 2


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"a": 1}', '{"a": {"torch": "x", "cuda_graph": 1}}'])
def test_a_damaged_file_is_measured_again(damage: str, kept: Path) -> None:
    net, given, _ = problem()
    engine_times(net, given)
    (key,) = json.loads(kept.read_text())
    cuda_graph._TIMES.clear()
    kept.write_text(damage.replace("a", key, 1))
    times = engine_times(net, given)
    assert times in json.loads(kept.read_text()).values()
    assert all(0 < seconds < 60 for seconds in times.values())


@pytest.mark.parametrize(("budget", "lasting"), [(-1, False), (1000, True)])
def test_times_with_a_choice_that_was_cut_short_are_not_kept(
    budget: float, lasting: bool, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dipguard.engines.cuda_graph._CHOSEN", {})
    monkeypatch.setattr("dipguard.engines.kernel_choice.BUDGET", budget)
    more = {"convolutions": ("grouped", "triton")}
    monkeypatch.setattr("dipguard.engines.cuda_graph.CudaGraphEngine", partial(CudaGraphEngine, **more))
    net, given, _ = problem()
    times = engine_times(net, given)
    assert all(0 < seconds < 60 for seconds in times.values())
    assert kept.exists() == lasting
    assert engine_times(net, given) == times, "a process measures once"


def test_stacks_of_nearly_the_same_size_have_one_choice(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {}
    monkeypatch.setattr("dipguard.engines.cuda_graph._CHOSEN", chosen)
    options = {"capture": False, "convolutions": ("grouped", "matmul")}
    for count in (3, 4, 5):
        CudaGraphEngine(build("small", stack_size=count), torch.rand(count, 3, 16, 16), **options)
    assert len(chosen) == 2


def test_a_choice_of_kernels_is_made_once_and_kept(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, chosen = kept.with_name("kernels.json"), {}
    monkeypatch.setattr("dipguard.engines.cuda_graph._CHOSEN", chosen)
    options = {"capture": False, "convolutions": ("grouped", "matmul")}
    first = CudaGraphEngine(*problem()[:2], **options).choice
    ((key, found),) = json.loads(file.read_text()).items()
    assert found == first
    other = {layer: {"grouped": "matmul", "matmul": "grouped"}.get(name, name) for layer, name in first.items()}
    assert other != first
    file.write_text(json.dumps({key: other}))
    assert CudaGraphEngine(*problem()[:2], **options).choice == first  # of this process
    chosen.clear()
    assert CudaGraphEngine(*problem()[:2], **options).choice == other  # of the file
    for damage in ({}, other | {"more": "torch"}, dict.fromkeys(other, "fft"), "text"):
        chosen.clear()
        file.write_text(json.dumps({key: damage}))
        assert set(CudaGraphEngine(*problem()[:2], **options).choice.values()) <= {"grouped", "matmul", "torch"}
    CudaGraphEngine(*problem()[:2], capture=False)
    assert len(json.loads(file.read_text())) == 1  # nothing was measured for a single candidate


def test_a_choice_that_was_cut_short_is_made_again_unless_bits_must_not_change(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, chosen = kept.with_name("kernels.json"), {}
    monkeypatch.setattr("dipguard.engines.cuda_graph._CHOSEN", chosen)
    options = {"capture": False, "convolutions": ("grouped", "triton", "matmul")}
    for strict, budget in ((False, -1), (True, -1), (False, 1000)):  # it is too late for Triton's kernels, or not
        chosen.clear()
        torch.use_deterministic_algorithms(strict)  # put back after each test
        monkeypatch.setattr("dipguard.engines.kernel_choice.BUDGET", budget)
        first = CudaGraphEngine(*problem()[:2], **options).choice
        assert file.exists() == (strict or budget > 0)
    (cut, complete) = json.loads(file.read_text())
    assert cut.replace(" deterministic", "") == complete != cut
    other = {layer: {"grouped": "matmul", "matmul": "grouped"}.get(name, name) for layer, name in first.items()}
    file.write_text(json.dumps({cut: other, complete: first}))
    for strict, expected in ((False, first), (True, other)):
        torch.use_deterministic_algorithms(strict)
        chosen.clear()
        assert CudaGraphEngine(*problem()[:2], **options).choice == expected


def test_what_several_processes_keep_at_a_time_is_all_kept(kept: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: _keep(kept, f"key {number}", {"torch": 1.0}), range(40)))
    assert len(json.loads(kept.read_text())) == 40


def test_an_engine_that_cannot_run_is_never_the_fastest(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    net, given, _ = problem()
    wrong = given.half()  # torch's engine subtracts it; the graph's has no z of the network's dtype
    assert engine_times(net, wrong)["cuda_graph"] == float("inf")
    assert "the engine 'cuda_graph' cannot be used here" in caplog.text
    assert not kept.exists()


@pytest.mark.parametrize("problem_met", [FileNotFoundError("no compiler"), torch.OutOfMemoryError("out of memory")])
def test_torch_s_engine_takes_over_where_the_graph_cannot_be_made_unless_memory_is_lacking(
    problem_met: Exception, kept: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, given, z = problem()
    expected = TorchEngine(net, given).step(z).reconstructions

    def fails(net: torch.nn.Module, choice: Any) -> None:
        use_kernels(net, {layer: "matmul" for layer, name in choice.items() if name == "grouped"})
        raise problem_met

    monkeypatch.setattr("dipguard.engines.cuda_graph.engine_times", lambda *a, **k: {"torch": 2.0, "cuda_graph": 1.0})
    monkeypatch.setattr("dipguard.engines.cuda_graph.use_kernels", fails)
    if isinstance(problem_met, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError):
            fastest_engine(net, given)
        return
    engine = fastest_engine(net, given)
    assert "the engine 'cuda_graph' cannot be used, torch's takes its place: no compiler" in caplog.text
    assert engine.name == "torch"
    assert torch.equal(engine.step(z).reconstructions, expected), "with kernels that run everywhere"


@needs_cuda
def test_auto_is_measured_on_a_gpu(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dipguard.engines.cuda_graph._CHOSEN", {})
    monkeypatch.setattr("dipguard.engines.kernel_choice.BUDGET", 1e9)  # however long Triton compiles
    net, given, _ = problem(dtype=torch.float32, device="cuda")
    engine = make_engine("auto", net, given, steps=100)
    (times,) = json.loads(kept.read_text()).values()
    assert engine.name == min(times, key=times.__getitem__)
    assert make_engine("auto", net, given, steps=99).name == "torch"


@needs_cuda
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("name", "padding"), [("auto", "zeros"), ("cuda_graph", "zeros"), ("cuda_graph", "reflect")])
def test_a_fit_gives_the_same_bits_twice(name: str, padding: str, strict: bool, kept: Path) -> None:
    images = torch.rand(4, 3, 32, 32, device="cuda")
    victim = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10)).cuda()
    torch.use_deterministic_algorithms(strict)  # put back after each test
    guard = MirrorGuard(victim, engine=name, padding=padding, progress=False)
    assert torch.equal(guard.purify(images), guard.purify(images))
