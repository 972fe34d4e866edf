"""Memory of a fit: estimated, looked up, and kept between steps."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dipguard.fit import DecideOptions, FitOptions
from dipguard.fit.memory import available_memory, cgroup_memory, free_memory, memory_need
from dipguard.fit.runner import kept_memory

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the free memory is not known")
COUNT = """
import json, resource, torch
from dipguard.fit.runner import kept_memory

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
    if not kept:
        pytest.skip("another C library than glibc lacks the switch")
    assert outside > 200  # ten times 48 MiB are 240 huge pages, and far more small ones
    assert inside < outside / 5


def test_nothing_is_done_for_a_gpu_and_errors_pass() -> None:
    with kept_memory(torch.device("cuda")) as kept:
        assert not kept
    with pytest.raises(KeyError), kept_memory(CPU):
        raise KeyError


def need(network: str, side: int, engine: str, **decide: Any) -> tuple[int, int]:
    fit = FitOptions(network=network, engine=engine)
    return memory_need((side, side), fit=fit, kept=DecideOptions(**decide).images_kept, engine=engine)


def test_an_image_needs_what_its_parts_need() -> None:
    image = 3 * 64 * 64 * 4
    _, little = need("small", 64, "torch", K_max=5)
    _, more = need("small", 64, "torch", K_max=6)
    assert more - little == 5 * image  # a last sample, and two crossings of two images each
    _, quarter = need("small", 32, "torch", K_max=5)
    assert 3.5 < little / quarter < 4.5, "nearly all of it is activations"
    shared, native = need("small", 64, "native", K_max=5)
    assert native < little / 2, "the native engine keeps activations by the thread, not by the image"
    assert shared > 0


SEEN = """
import json, sys
import torch
from torch import nn
from dipguard.fit import DecideOptions, FitOptions, StitchOptions, fit_stack
from dipguard.fit.memory import memory_need

engine, B = sys.argv[1], 96
fit, decide = FitOptions(network="medium", engine=engine), DecideOptions(T=4, decisions=4, K_max=3)
cpu, victim = torch.device("cpu"), nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
peaks = []
for images in (torch.rand(1, 3, 32, 32), torch.rand(B, 3, 32, 32)):
    fit_stack(images, victim=victim, indices=range(len(images)), fit=fit, decide=decide,
        stitch=StitchOptions(tau=0.7, t0=50, K=3, beta=0.5), device=cpu)
    with open("/proc/self/status") as file:  # resource's figure would be the parent's, where that is larger
        peaks += [int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")]
seen = (peaks[1] - peaks[0]) / (B - 1)
print(json.dumps([seen, memory_need((32, 32), fit=fit, kept=decide.images_kept, engine=engine)[1]]))
"""


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "native"])
def test_the_estimate_is_near_what_a_fit_takes(engine: str) -> None:
    done = subprocess.run([sys.executable, "-c", SEEN, engine], cwd=ROOT, capture_output=True, text=True, check=True)
    seen, estimated = json.loads(done.stdout.splitlines()[-1])
    assert seen / 2 < estimated < 2 * seen


@LINUX
def test_free_memory_is_that_of_this_machine() -> None:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    total = int(lines[0].split()[1]) * 1024
    before, free, after = available_memory(), free_memory(CPU), available_memory()
    assert 0 < free <= total
    assert free <= max(before, after) * 1.05


GIB = 2**30
ONE = {"proc/self/cgroup": "4:memory:/job\n1:cpu:/\n0::/\n"}
TWO = {"proc/self/cgroup": "0::/user/job\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, []),
        ({**TWO, "user/job/memory.max": "max\n", "user/job/memory.current": "5\n"}, []),
        ({**TWO, "user/job/memory.max": f"{2 * GIB}\n", "user/job/memory.current": f"{GIB}\n"}, [GIB]),
        (
            {
                **TWO,
                "user/job/memory.max": f"{3 * GIB}\n",
                "user/job/memory.current": f"{2 * GIB}\n",
                "user/job/memory.stat": f"anon 7\ninactive_file {GIB // 2}\nactive_file 9\n",
                "user/memory.max": f"{GIB}\n",
                "user/memory.current": f"{GIB}\n",
            },
            [0, 3 * GIB // 2],
        ),
        ({**TWO, "memory.max": f"{GIB}\n", "memory.current": "0\n"}, [GIB]),
        (
            {**ONE, "memory/job/memory.limit_in_bytes": f"{GIB}\n", "memory/job/memory.usage_in_bytes": "1\n"},
            [GIB - 1],
        ),
        ({**ONE, "memory/memory.limit_in_bytes": "4\n", "memory/memory.usage_in_bytes": "3\n"}, [1]),
    ],
)
def test_limits_of_control_groups(tmp_path: Path, files: dict[str, str], expected: list[int]) -> None:
    for name, text in files.items():
        path = tmp_path / name if name.startswith("proc") else tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert sorted(cgroup_memory(tmp_path)) == expected
    assert available_memory(tmp_path) is None
