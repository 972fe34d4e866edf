"""The jitter drawn ahead by threads is the fit's own."""

import time

import pytest
import torch

from dipguard.engines.jitter_feed import JitterFeed
from dipguard.seeding import BLOCK, Jitter

SHAPE = (4, 5, 6)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("waits", "indices"), [(0.0, [5, 2, 9]), (0.005, [5, 2, 9]), (0.0, [2])])
def test_the_numbers_are_those_of_the_fit(waits: float, indices: list[int], dtype: torch.dtype, device: str) -> None:
    options = {"indices": indices, "seed": 3, "std": 0.1}
    z = torch.rand(len(indices), *SHAPE, dtype=dtype, device=device)
    theirs, ours = Jitter(SHAPE, **options), JitterFeed(SHAPE, device=torch.device(device), **options)
    for t in range(5 * BLOCK + 3):
        # With a wait the next block has long been drawn and is copied early; without, the threads are behind.
        time.sleep(waits if t % BLOCK == 2 else 0)
        right, seen = theirs.next(z), ours.next(z)
        assert seen.dtype == dtype
        assert torch.equal(seen, right), t
    ours.close()


def test_it_works_when_made_under_inference_mode_and_used_outside() -> None:
    with torch.inference_mode():
        feed = JitterFeed(SHAPE, indices=[0], seed=0, std=1.0, device=torch.device("cpu"))
    z = torch.zeros(1, *SHAPE, requires_grad=True)
    for _ in range(2 * BLOCK + 1):
        assert feed.next(z).requires_grad
