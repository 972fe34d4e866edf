"""The stopwatch."""

import time

import pytest
import torch

from dipguard.engines.kernel_choice import median_seconds


class Clock:
    """Shows the seconds that the work is said to have taken."""

    def __init__(self) -> None:
        self.now, self.runs = 0.0, 0

    def work(self, seconds: float) -> None:
        self.now, self.runs = self.now + seconds, self.runs + 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: made.now)
    return made


@pytest.mark.parametrize(("runs", "median"), [(1, 0.5), (5, 0.25)])
def test_the_median_of_the_runs_after_a_warm_one(runs: int, median: float, clock: Clock) -> None:
    waits = iter([8.0, 0.5, 0.25, 0.125, 4.0, 0.0])
    assert median_seconds(lambda: clock.work(next(waits)), device=torch.device("cpu"), runs=runs) == median
    assert clock.runs == runs + 1


@pytest.mark.parametrize(("wait", "best", "runs"), [(0.0, None, 5), (0.02, None, 5), (0.02, 1.0, 1), (0.002, 1e-4, 1)])
def test_what_is_slow_or_cannot_be_the_best_is_run_once(
    wait: float, best: float | None, runs: int, clock: Clock
) -> None:
    median_seconds(lambda: clock.work(wait), device=torch.device("cpu"), best=best)
    assert clock.runs == runs + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_more_work_takes_longer() -> None:
    device = torch.device("cuda")
    small, large = torch.rand(256, 256, device=device), torch.rand(4096, 4096, device=device)
    quick, slow = (median_seconds(lambda x=x: x @ x, device=device) for x in (small, large))
    assert 0 < 2 * quick < slow
