"""The stack size that is chosen where nobody says one, and the memory that bounds it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dipguard.fit import DecideOptions, FitOptions, choose_stack_size, stack_size
from dipguard.fit.image_memory import available_memory, cgroup_memory, free_memory, images_in_memory, memory_need
from dipguard.fit.runner import apart
from dipguard.fit.stack_size import SIZES, measure, smallest_good

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="nobody says what is free")


def choose(count: int, *, T: int, size: tuple[int, int] = (16, 16), engine: str = "torch", **decide: Any) -> int:
    options = DecideOptions(T=T, decisions=None, every=max(1, T // 10), **decide)
    return choose_stack_size(
        count, size=size, fit=FitOptions(network="small", engine=engine), decide=options, device=CPU
    )


@pytest.mark.parametrize(("count", "T"), [(1, 1000), (4, 1000), (100, 20)])
def test_a_short_job_takes_the_fixed_size(count: int, T: int) -> None:
    assert choose(count, T=T) == 32
    assert not [key for key in stack_size._best if key[2] == (16, 16)]


def test_a_long_job_measures_once_and_changes_no_random_number() -> None:
    state, mode = torch.get_rng_state(), torch.is_grad_enabled()
    with torch.inference_mode():
        chosen = choose(20, T=10_000, size=(16, 17))
    assert chosen in (8, 16)
    key = (CPU, stack_size.resolve("small"), (16, 17), "float32", "torch")
    assert stack_size._best[key] == chosen
    stack_size._best[key] = 2  # what another clock might have said
    assert choose(20, T=10_000, size=(16, 17)) == 2
    assert choose(1, T=10, size=(16, 17)) == 2, "a process keeps to one size"
    assert choose(20, T=10, size=(16, 18)) == 32
    assert (torch.is_grad_enabled(), torch.equal(torch.get_rng_state(), state)) == (mode, True)


def test_the_clock_runs_over_real_steps() -> None:
    with apart(CPU):
        times = measure((1, 2, 4), size=(16, 16), fit=FitOptions(network="small", engine="torch"), device=CPU)
    assert list(times) == [1, 2, 4]
    assert all(1e-5 < seconds < 1 for seconds in times.values())


@pytest.mark.filterwarnings("ignore:out of memory")
def test_sizes_that_do_not_fit_are_left_out() -> None:
    with apart(CPU):
        times = measure((1, 2**40), size=(16, 16), fit=FitOptions(network="small", engine="torch"), device=CPU)
    assert list(times) == [1]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({8: 1.0}, 8),
        ({8: 1.0, 16: 0.96, 32: 0.97}, 8),
        ({8: 1.0, 16: 0.9, 32: 0.86}, 16),
        ({8: 1.0, 16: 0.9, 32: 0.5}, 32),
        ({8: 1.0, 16: 2.0, 32: 3.0}, 8),
    ],
)
def test_the_smallest_of_the_fast_ones_is_taken(times: dict[int, float], expected: int) -> None:
    assert smallest_good(times) == expected


@LINUX
def test_memory_bounds_the_choice() -> None:
    size, T = (512, 512), 4000
    decide = DecideOptions(T=T, decisions=T, keep_samples=True)
    fit = FitOptions(network="small", engine="torch")
    bound = images_in_memory(size, fit=fit, decide=decide, engine="torch", device=CPU)
    assert bound is not None
    chosen = choose_stack_size(1, size=size, fit=fit, decide=decide, device=CPU)
    assert chosen <= max(1, min(32, bound * 1.5)), "what is free changes from moment to moment"
    assert math.log2(chosen).is_integer()


def need(network: str, side: int, engine: str, **decide: Any) -> tuple[int, int]:
    fit = FitOptions(network=network, engine=engine)
    return memory_need((side, side), fit=fit, decide=DecideOptions(**decide), engine=engine, device=CPU)


def test_an_image_needs_what_its_parts_need() -> None:
    image = 3 * 64 * 64 * 4
    _, little = need("small", 64, "torch", K_max=5)
    _, more = need("small", 64, "torch", K_max=6)
    assert more - little == 5 * image  # a last sample, and two crossings of two images each
    _, kept = need("small", 64, "torch", K_max=5, keep_samples=True)
    assert kept - little == 200 * image
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
from dipguard.fit.image_memory import memory_need

engine, B = sys.argv[1], 96
fit, decide = FitOptions(network="medium", engine=engine), DecideOptions(T=4, decisions=4, K_max=3)
cpu, victim = torch.device("cpu"), nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
peaks = []
for images in (torch.rand(1, 3, 32, 32), torch.rand(B, 3, 32, 32)):
    fit_stack(images, victim=victim, indices=range(len(images)), fit=fit, decide=decide,
        stitch=StitchOptions(K=3), device=cpu)
    with open("/proc/self/status") as file:  # resource's figure would be the parent's, where that is larger
        peaks += [int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")]
seen = (peaks[1] - peaks[0]) / (B - 1)
print(json.dumps([seen, memory_need((32, 32), fit=fit, decide=decide, engine=engine, device=cpu)[1]]))
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
    free = free_memory(CPU)
    assert free is not None
    assert 0 < free <= total
    available = available_memory()
    assert available is not None
    assert free <= available * 1.05


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


def test_candidates_are_powers_of_two_and_hold_the_default() -> None:
    for sizes in SIZES.values():
        assert all(math.log2(size).is_integer() for size in sizes.candidates)
        assert sizes.default in sizes.candidates
        assert list(sizes.candidates) == sorted(sizes.candidates)
