"""What must hold however rough the treatment: kills, full disks, damaged files, and any order of work.

Each series counts what it did. ``DIPGUARD_TORTURE=10`` makes them ten times as long.
"""

import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from dipguard.data import load_data
from dipguard.defenses import MirrorGuard
from dipguard.victims import build_victim
from tests.cli.conftest import save
from tests.tiny_matrix import TINY as MATRIX
from tests.tiny_run import ROOT
from tests.tiny_run import TINY as RUN

pytestmark = pytest.mark.slow

TIMES = int(os.environ.get("DIPGUARD_TORTURE", "1"))
KILLS, FULL_DISKS, DAMAGES = 3 * TIMES, 2 * TIMES, 12 * TIMES
LONGEST = 1200
"""Seconds after which a run counts as hanging, also on a machine that has more to do."""
Command = Callable[[Path], list[str]]


def _train(folder: Path) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), f"hydra.run.dir={folder}", *RUN, "figures=0"]


def _evaluate(folder: Path) -> list[str]:
    few = ["figures=0", "~attacks.fgsm_8", "~defenses.dip_fixed", "~defenses.median"]
    return [sys.executable, str(ROOT / "evaluate.py"), f"hydra.run.dir={folder}", *MATRIX, *few]


def _purify(folder: Path) -> list[str]:
    given = folder.parent / "given"
    if not given.exists():
        for number, image in enumerate(load_data("digits", limit=6).images):
            save(image, given / f"{number}.png")
    words = ["--victim", "digits_cnn", "--option", "T=30", "t0=5", "every=5", "--batch", "2", "--figures", "0"]
    return [sys.executable, "-m", "dipguard", "purify", str(given), str(folder), *words]


PROGRAMS: dict[str, Command] = {"train": _train, "evaluate": _evaluate, "purify": _purify}


def start(command: list[str], **options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=ROOT, **pipes, **options)  # type: ignore[call-overload]


def finish(command: list[str]) -> float:
    """Run to the end; return the seconds."""
    began = time.monotonic()
    process = start(command)
    _, said = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, said
    return time.monotonic() - began


def results(folder: Path) -> dict[str, object]:
    """All that a run leaves behind, but for what tells times and paths."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name in ("images.csv", "decisions.csv") or path.suffix == ".png":
            found[name] = path.read_bytes()
        elif path.suffix == ".safetensors":  # the order of its header's keys is by chance
            found[name] = {key: array.tobytes() for key, array in load_file(path).items()}
        elif path.name == "reconstructions.npz":
            with np.load(path) as arrays:
                found[name] = {key: arrays[key].tobytes() for key in arrays.files}
    assert found
    return found


@pytest.fixture(scope="module", params=list(PROGRAMS))
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A program, the results of an uninterrupted run, and how long that took."""
    command, folder = PROGRAMS[request.param], tmp_path_factory.mktemp(request.param) / "whole"
    finish(command(folder))
    # The first run trains the digits victim and compiles the engine, and may take twice as long as those after it.
    seconds = finish(command(folder.with_name("again")))
    assert results(folder.with_name("again")) == results(folder)
    return command, results(folder), seconds


def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(program: tuple, tmp_path: Path) -> None:
    command, whole, seconds = program
    moments, kills, folders = random.Random(0), 0, 0
    while kills < KILLS:
        folder, folders = tmp_path / str(folders) / "out", folders + 1
        for _ in range(3):
            process = start(command(folder))
            try:
                process.communicate(timeout=moments.uniform(0.25, 0.8) * seconds)
            except subprocess.TimeoutExpired:  # else it has ended, and is no kill
                process.kill()
                process.communicate()
                kills += 1
        finish(command(folder))
        assert results(folder) == whole
        assert not [path for path in folder.rglob(".*") if path.is_file() and path.name.count(".") > 2], "left over"
    print(f"{kills} kills, {folders} runs finished, all bit-equal")


def test_a_full_disk_ends_a_run_with_a_message_and_loses_nothing(program: tuple, tmp_path: Path) -> None:
    command, whole, _ = program
    sizes, ended = random.Random(1), 0
    for number in range(FULL_DISKS):
        folder = tmp_path / str(number) / "out"
        # The kernel refuses to let a file grow beyond this, as it does on a full disk.
        limit = int(2 ** sizes.uniform(7, 15))
        process = start(
            command(folder), preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        )
        _, said = process.communicate(timeout=LONGEST)
        if process.returncode != 0:
            ended += 1
            assert "File too large" in said, said[-2000:]
        finish(command(folder))
        assert results(folder) == whole
    assert ended, "no run met the limit"
    print(f"{ended} of {FULL_DISKS} runs ended at a full disk, all went on bit-equal")


def test_damaged_entries_are_made_again(tmp_path: Path) -> None:
    folder, chance, damaged = tmp_path / "out", random.Random(2), 0
    finish(_evaluate(folder))
    whole = results(folder)
    while damaged < DAMAGES:
        entries = [path for path in sorted((folder / "store").rglob("*")) if path.is_file() and path.stat().st_size]
        for path in chance.sample(entries, min(DAMAGES, len(entries))):
            content = bytearray(path.read_bytes())
            kind = damaged % 4
            if kind == 0:
                content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            elif kind == 1:
                del content[chance.randrange(len(content)) :]
            elif kind == 2:
                content = bytearray(chance.randbytes(len(content)))
            else:
                content[chance.randrange(len(content))] = chance.randrange(256)
            path.write_bytes(bytes(content))
            damaged += 1
        (folder / "images.csv").unlink()
        finish(_evaluate(folder))
        assert results(folder) == whole
    print(f"{damaged} damaged entries, all results equal")


def test_memory_stays_flat_over_many_pictures(tmp_path: Path) -> None:
    peaks = {}
    for count in (300, 1500 * TIMES):
        images = load_data("digits", limit=8).images
        for number in range(count):
            save(images[number % 8].roll(number // 8, -1), tmp_path / str(count) / "given" / f"{number}.png")
        words = ["--victim", "digits_cnn", "--defense", "jpeg", "--figures", "0", "--no-progress"]
        folders = [str(tmp_path / str(count) / name) for name in ("given", "out")]
        process = start([sys.executable, "-m", "dipguard", "purify", *folders, *words])
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        peaks[count] = usage.ru_maxrss / 1024
    few, many = peaks.values()
    assert many < few + 60, f"{peaks} MiB"
    print(f"peak memory: {peaks} MiB")


def test_results_depend_on_neither_threads_nor_neighbours_nor_order() -> None:
    digits, victim = load_data("digits", limit=7), build_victim("digits_cnn", progress=False)
    options = {"T": 30, "t0": 10, "every": 5, "progress": False, "engine": "native"}
    whole, runs = None, 0
    for threads in (1, 2):
        for stack_size in (1, 2, 3, 7):
            for order in (torch.arange(7), torch.randperm(7, generator=torch.Generator().manual_seed(stack_size))):
                torch.set_num_threads(threads)
                guard = MirrorGuard(victim, stack_size=stack_size, **options)
                made = guard.purify(digits.images[order], indices=digits.indices[order])
                made = made[order.argsort()]
                whole = made if whole is None else whole
                assert torch.equal(made, whole), (threads, stack_size, order.tolist())
                runs += 1
    print(f"{runs} runs, all bit-equal")
