"""The stopwatch."""

import time

import pytest
import torch

from dipguard.engines.kernel_choice import median_seconds


@pytest.mark.parametrize("runs", [1, 5])
def test_the_median_of_the_runs_after_a_warm_one(runs: int) -> None:
    waits = iter([1.0, 0.01, 0.01, 0.01, 0.8, 0.0])  # far apart: a busy machine may sleep too long
    seen = []

    def work() -> None:
        seen.append(next(waits))
        time.sleep(seen[-1])

    seconds = median_seconds(work, device=torch.device("cpu"), runs=runs)
    assert len(seen) == runs + 1
    assert 0.01 <= seconds < 0.5


@pytest.mark.parametrize(("wait", "best", "runs"), [(0.0, None, 5), (0.02, None, 5), (0.02, 1.0, 1), (0.002, 1e-4, 1)])
def test_what_is_slow_or_cannot_be_the_best_is_run_once(wait: float, best: float | None, runs: int) -> None:
    seen = []

    def work() -> None:
        seen.append(wait)
        time.sleep(wait)

    median_seconds(work, device=torch.device("cpu"), best=best)
    assert len(seen) == runs + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_more_work_takes_longer() -> None:
    device = torch.device("cuda")
    small, large = torch.rand(256, 256, device=device), torch.rand(4096, 4096, device=device)
    quick, slow = (median_seconds(lambda x=x: x @ x, device=device) for x in (small, large))
    assert 0 < 2 * quick < slow
