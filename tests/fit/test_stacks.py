"""Many images in stacks, and what happens where memory runs out. The shortage is real in every test."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dipguard import DIPGuard
from dipguard.engines.native_build import compiler
from dipguard.fit import FitProgress, in_stacks
from dipguard.fit.out_of_memory import is_out_of_memory

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
TOO_MUCH = 2**60


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
def test_a_stack_that_does_not_fit_is_halved_and_begun_again(
    count: int, size: int, most: int, expected: list[int], tried: list[int]
) -> None:
    parts, calls = cut(count, size, most, T=10)
    assert [part.stop - part.start for part in parts] == expected
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    # Steps in a log must grow, also where a stack is begun again.
    assert calls == [(images, 10 * number) for number, images in enumerate(tried)]


@pytest.mark.filterwarnings("ignore:out of memory")
def test_a_refilled_stack_that_does_not_fit_is_halved_too() -> None:
    tried = []

    def work(part: slice, first_step: int, progress: FitProgress) -> slice:
        tried.append((part.stop - part.start, progress.slots, first_step))
        torch.empty(1 if progress.slots <= 2 else TOO_MUCH)
        return part

    parts = list(in_stacks(11, size=4, T=10, work=work, device=CPU, progress=False, rounds=3))
    assert parts == [slice(0, 6), slice(6, 11)]
    assert tried == [(11, 4, 0), (6, 2, 50), (5, 2, 100)]


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
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (OSError("Cannot allocate memory"), False),
    ],
)
def test_errors_that_say_so(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


class Greedy(nn.Module):
    """A victim that runs out of memory on more than `most` images: in the middle of a fit, where others succeed."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.calls = 0
        self.linear = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if len(x) > self.most and self.calls > 2:
            torch.empty(TOO_MUCH)
        return self.linear(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.mark.filterwarnings("ignore:out of memory")
def test_progress_and_seconds_count_what_came_of_it(images: Tensor, capfd: pytest.CaptureFixture[str]) -> None:
    guard = DIPGuard(Greedy(2), network="small", T=24, decisions=12, tau=1.0, stack_size=4, N=1)
    parts = list(guard.defend_stacks(images[:5]))
    assert [len(part.traces) for part in parts] == [2, 2, 1]
    shown = capfd.readouterr().err
    assert "120/120" in shown
    assert "fit: 100%" in shown
    assert all(set(part.seconds) == {"start", "fit", "decide"} and min(part.seconds.values()) > 0 for part in parts)


SHORTAGE = """
import json, resource, sys, warnings
import torch
from torch import nn
from dipguard import DIPGuard

draw = torch.Generator().manual_seed(0)
images = torch.rand(40, 3, 32, 32, generator=draw)
victim = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 4))
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
for engine, dtype, megabytes in json.loads(sys.argv[1]):
    options = dict(T=4, decisions=4, tau=0.0, t0=0, K=3, engine=engine, dtype=dtype, progress=False)
    DIPGuard(victim, stack_size=1, **options).defend(images[:1])
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, hard))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        parts = list(DIPGuard(victim, stack_size=40, **options).defend_stacks(images))
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    sizes, same = [len(part.traces) for part in parts], []
    for part in (parts[0], parts[-1]):
        indices = [trace.index for trace in part.traces]
        alone = DIPGuard(victim, stack_size=len(indices), **options).defend(images[indices], indices=indices)
        same += [one.equals(other) for one, other in zip(part.traces, alone.traces)]
    print(json.dumps({"sizes": sizes, "warnings": [str(w.message) for w in seen], "same": all(same)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space")
@pytest.mark.slow
def test_a_fit_in_too_little_memory_goes_on_in_smaller_stacks() -> None:
    native = [] if compiler() is None else [("native", "float32", 50)]
    cases = json.dumps([*native, ("torch", "float64", 150)])
    done = subprocess.run(
        [sys.executable, "-c", SHORTAGE, cases], cwd=ROOT, capture_output=True, text=True, check=False
    )
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
