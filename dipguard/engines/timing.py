"""How long work takes on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

AHEAD = 2_000_000
"""Clock cycles, about a millisecond, for which the GPU waits while the host queues the work to be timed."""


def median_seconds(work: Callable[[], object], *, device: torch.device, runs: int = 5) -> float:
    """The median of ``runs`` runs after a warm-up; on a GPU the device's own time, without the time to launch kernels.

    A fit step is launched as a whole, as a CUDA graph, so the gaps between kernels do not count.
    """
    work()
    if device.type != "cuda":
        return statistics.median(_wall(work) for _ in range(runs))
    with torch.cuda.device(device):
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
        for start, end in pairs:
            torch.cuda._sleep(AHEAD)
            start.record()
            work()
            end.record()
        torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def _wall(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
