from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dipguard.fit.memory import kept_memory

ROOT = Path(__file__).resolve().parents[2]
COUNT = """
import json, resource, torch
from dipguard.fit.memory import kept_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(12 * 2**20)  # a block of 48 MiB is taken and given back
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with kept_memory(torch.device("cpu")) as kept:
    page_faults()
    inside = page_faults()
print(json.dumps([kept, inside, page_faults()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has the switch")
def test_freed_blocks_are_used_again_and_given_back_afterwards() -> None:
    # In a process of its own: blocks that other tests have freed in this one would be used first.
    ended = subprocess.run([sys.executable, "-c", COUNT], cwd=ROOT, capture_output=True, text=True, check=True)
    kept, inside, outside = json.loads(ended.stdout)
    if kept:  # another C library than glibc lacks the switch
        assert outside > 200  # ten times 48 MiB are 240 huge pages, and far more small ones
        assert inside < outside / 5


def test_nothing_is_done_for_a_gpu_and_errors_pass() -> None:
    with kept_memory(torch.device("cuda")) as kept:
        assert not kept
    with pytest.raises(KeyError), kept_memory(torch.device("cpu")):
        raise KeyError
