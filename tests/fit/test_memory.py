from __future__ import annotations

import resource
import sys

import pytest
import torch

from dipguard.fit.memory import kept_memory


def page_faults() -> int:
    """Page faults of ten rounds in which a block of 48 MiB is taken and given back."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(12 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has the switch")
def test_freed_blocks_are_used_again_and_given_back_afterwards() -> None:
    with kept_memory(torch.device("cpu")) as kept:
        page_faults()
        inside = page_faults()
    outside = page_faults()
    if kept:  # another C library than glibc lacks the switch
        assert outside > 200  # ten times 48 MiB are 240 huge pages, and far more small ones
        assert inside < outside / 5


def test_nothing_is_done_for_a_gpu_and_errors_pass() -> None:
    with kept_memory(torch.device("cuda")) as kept:
        assert not kept
    with pytest.raises(KeyError), kept_memory(torch.device("cpu")):
        raise KeyError
