"""Many images in stacks, how many at once, and what happens when memory runs out. Every shortage is real."""

import gc
import io
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dipguard.classifier import is_out_of_memory
from dipguard.decision.stopping import PeakOfSmoothedPSNR
from dipguard.engines.base import say_once
from dipguard.engines.native_build import compiler
from dipguard.fit import (
    DecideOptions,
    FitOptions,
    FitProgress,
    StackResult,
    StitchOptions,
    fit_stack,
    in_stacks,
    stack_size_for,
)
from dipguard.fit.memory import memory_need
from tests.fit.conftest import NATIVE, At, fit_rule, stop

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
TOO_MUCH = 2**60


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection() -> Iterator[None]:
    """What other tests have left behind is not looked through again after each shortage."""
    gc.freeze()
    yield
    gc.unfreeze()


def cut(count: int, size: int, most: int, *, T: int = 1) -> tuple[list[slice], list[tuple[int, int]]]:
    """The stacks that come through where `most` images fit into memory, and what was tried (images, first step)."""
    tried = []

    def work(part: slice, first_step: int, progress: FitProgress) -> slice:
        tried.append((part.stop - part.start, first_step))
        torch.empty(1 if part.stop - part.start <= most else TOO_MUCH)
        return part

    return list(in_stacks(count, size=size, T=T, work=work, device=CPU, progress=False)), tried


@pytest.mark.parametrize(
    ("count", "size", "most", "expected", "tried"),
    [
        (5, 2, 2, [2, 2, 1], [2, 2, 1]),
        (3, 8, 8, [3], [3]),
        (10, 8, 2, [2, 2, 2, 2, 2], [8, 4, 2, 2, 2, 2, 2]),
        (7, 5, 4, [3, 3, 1], [5, 3, 3, 1]),
        (3, 8, 1, [1, 1, 1], [3, 2, 1, 1, 1]),
    ],
)
@pytest.mark.filterwarnings("ignore:out of memory")
def test_a_stack_that_does_not_fit_is_halved_and_begun_again(count, size, most, expected, tried) -> None:
    parts, calls = cut(count, size, most, T=10)
    assert [part.stop - part.start for part in parts] == expected
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    # Steps in a log must grow, also where a stack is begun again.
    assert calls == [(images, 10 * number) for number, images in enumerate(tried)]


def test_there_is_one_warning_and_none_where_memory_suffices() -> None:
    with pytest.warns(UserWarning, match=r"out of memory with 8 images at once; going on with 4 .*DefaultCPU") as seen:
        cut(8, 8, 2)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cut(8, 8, 8)


def test_too_little_for_a_single_image_names_the_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"a single image .* smaller `network`.*DefaultCPUAllocator"):
        cut(1, 1, 0)


@pytest.mark.parametrize(
    "error", [RuntimeError("size mismatch"), ValueError("not enough memory"), KeyboardInterrupt(), SystemExit()]
)
def test_other_errors_pass_at_once(error: BaseException) -> None:
    def work(part: slice, first_step: int, progress: FitProgress) -> None:
        assert first_step == 0, "it was tried again"
        raise error

    with pytest.raises(type(error)):
        list(in_stacks(4, size=4, T=1, work=work, device=CPU, progress=False))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (OSError("Cannot allocate memory"), False),
    ],
)
def test_errors_that_say_so(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


class Greedy(nn.Module):
    """A victim that runs out of memory on more than `most` images, in the middle of a fit."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.calls = most, 0
        self.linear = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if len(x) > self.most and self.calls > 1:
            torch.empty(TOO_MUCH)
        return self.linear(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.mark.filterwarnings("ignore:out of memory")
def test_progress_and_seconds_count_what_came_of_it(images: Tensor, capfd: pytest.CaptureFixture[str]) -> None:
    victim = Greedy(5)

    def work(part: slice, first_step: int, progress: FitProgress) -> StackResult:
        victim.most = 0 if part.stop - part.start > 2 else 5  # a large stack leaves no memory for a single image
        decide, stitch = DecideOptions(T=6, decisions=3, N=1), StitchOptions(tau=1.0, t0=0, K=1, beta=0.5)
        how = {"indices": range(part.start, part.stop), "fit": FitOptions(network="small"), "device": CPU}
        told = {"first_step": first_step, "callbacks": [progress]}
        return fit_stack(images[part], victim=victim, decide=decide, stitch=stitch, **how, **told)

    parts = list(in_stacks(5, size=4, T=6, work=work, device=CPU, progress=True))
    assert [len(part.traces) for part in parts] == [2, 2, 1]
    shown = capfd.readouterr().err
    assert "30.0/30.0" in shown
    assert "fit: 100%" in shown
    assert all(set(part.seconds) == {"start", "fit", "decide"} and min(part.seconds.values()) > 0 for part in parts)


def test_progress_leaves_out_what_a_fit_did_not_need(images: Tensor) -> None:
    with tqdm(total=200, file=io.StringIO()) as bar:
        progress, how = FitProgress(bar), {"fit": FitOptions(network="small"), "T": 61, "device": CPU}
        callbacks = [progress, At(49, stop)]
        fit_rule(images[:2], rule=PeakOfSmoothedPSNR(), indices=[0, 1], callbacks=callbacks, **how)
        assert (bar.n, bar.total) == (100, 200 - 2 * 11)
        progress.skip(7)
        assert bar.total == 200 - 2 * 11 - 7
        progress.roll_back()
        assert (bar.n, bar.total) == (0, 200)


SHORTAGE = """
import json, resource, sys, warnings
import torch
from torch import nn
from dipguard.fit import DecideOptions, FitOptions, StitchOptions, fit_stack, in_stacks

draw = torch.Generator().manual_seed(0)
images = torch.rand(40, 3, 32, 32, generator=draw)
victim = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 4))
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
for engine, dtype, megabytes in json.loads(sys.argv[1]):
    def fit(indices, callbacks=()):
        return fit_stack(images[indices], victim=victim, indices=indices, fit=FitOptions(engine=engine, dtype=dtype),
            decide=DecideOptions(T=4, decisions=4), stitch=StitchOptions(tau=0.0, t0=0, K=3, beta=0.5),
            device=torch.device("cpu"), callbacks=callbacks)
    def work(part, first_step, progress):
        return fit(list(range(part.start, part.stop)), [progress])
    fit([0])
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, hard))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        parts = list(in_stacks(40, size=40, T=4, work=work, device=torch.device("cpu"), progress=False))
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    sizes, same = [len(part.traces) for part in parts], []
    for part in (parts[0], parts[-1]):
        indices = [trace.index for trace in part.traces]
        same += [one.equals(other) for one, other in zip(part.traces, fit(indices).traces)]
    print(json.dumps({"sizes": sizes, "warnings": [str(w.message) for w in seen], "same": all(same)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space")
@pytest.mark.slow
def test_a_fit_in_too_little_memory_goes_on_in_smaller_stacks() -> None:
    native = [] if compiler() is None else [("native", "float32", 50)]
    command = [sys.executable, "-c", SHORTAGE, json.dumps([*native, ("torch", "float64", 150)])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(native) + 1
    for told in map(json.loads, lines):
        sizes = told["sizes"]
        assert sum(sizes) == 40
        assert sizes[0] < 40
        assert sizes[:-1] == sorted(sizes[:-1], reverse=True), "it stays at the smaller size"
        assert [text for text in told["warnings"] if "out of memory with 40 images at once" in text]
        assert told["same"]


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (20, 20), (32, 32), (100, 32)])
def test_a_fixed_number_at_once_where_memory_allows(count: int, expected: int) -> None:
    fit = FitOptions(network="small", engine="torch")
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert stack_size_for(count, size=(16, 16), fit=fit, T=200, kept=10, device=CPU) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_memory_bounds_the_number_at_once_and_is_told_before_it_is_taken(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, fit = (256, 256), FitOptions(network="small", engine="torch")
    kept, free = 1000, 11 * 1000 * 3 * 256 * 256 * 4  # an image needs a little more than an eleventh of what is free
    monkeypatch.setattr("dipguard.fit.stacks.free_memory", lambda device: free)
    shared, each = memory_need(size, fit=fit, kept=kept, engine="torch")
    with caplog.at_level("INFO", logger="dipguard"):
        chosen = stack_size_for(32, size=size, fit=fit, T=200, kept=kept, device=CPU)
    gib = (shared + chosen * each) / 2**30
    plural = "s" * (chosen > 1)
    assert f"fits of {chosen} image{plural} of 256x256 pixels at once need {gib:.2f} GiB" in caplog.text
    assert chosen == 4, "half of the memory takes five"
    with caplog.at_level("INFO", logger="dipguard"):
        assert stack_size_for(31, size=size, fit=fit, T=200, kept=kept, device=CPU, asked=30) == 30  # and not reduced
    assert f"fits of 30 images of 256x256 pixels at once need {(shared + 30 * each) / 2**30:.2f} GiB" in caplog.text


def test_what_a_gpu_s_fit_keeps_must_fit_into_the_host_s_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, image_bytes = 200, 3 * 64 * 64 * 4
    memory = {"cuda": 2**40, "cpu": 40 * kept * image_bytes}
    monkeypatch.setattr("dipguard.fit.stacks.free_memory", lambda device: memory[device.type])
    monkeypatch.setattr("dipguard.fit.stacks.isolated_trainer", lambda device: nullcontext())
    how = {"size": (64, 64), "fit": FitOptions(network="small"), "T": 200, "device": torch.device("cuda")}
    assert stack_size_for(100, kept=kept, **how) == 16, "half of the memory takes twenty"
    assert stack_size_for(100, kept=0, **how) == 100
    with pytest.raises(ValueError, match="`engine` 'native' cannot be used here: it runs on a CPU, got a fit on cuda"):
        stack_size_for(100, kept=0, **{**how, "fit": FitOptions(engine="native")})


@pytest.mark.parametrize(
    ("T", "precision", "engine", "dtype"),
    [
        pytest.param(100, None, "native", "float32", marks=NATIVE),
        (99, None, "torch", "float32"),
        (100, "bf16-mixed", "torch", "float32"),
        pytest.param(100, "64-true", "native", "float64", marks=NATIVE),
    ],
)
def test_the_memory_that_is_told_is_that_of_the_engine_which_fits(T, precision, engine, dtype, caplog) -> None:
    torch.set_num_threads(1)  # put back after each test; the native engine's memory grows with them
    size, fit = (64, 64), FitOptions(network="small")
    shared, each = memory_need(size, fit=FitOptions(network="small", dtype=dtype), kept=2000, engine=engine)
    how = {"kept": 2000, "device": CPU, "trainer": {} if precision is None else {"precision": precision}}
    say_once.cache_clear()
    with caplog.at_level("INFO", logger="dipguard"):
        assert stack_size_for(2, size=size, fit=fit, T=T, asked=2, **how) == 2
    assert f"fits of 2 images of 64x64 pixels at once need {(shared + 2 * each) / 2**30:.2f} GiB" in caplog.text
