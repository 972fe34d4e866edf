"""Several processes and one store; processes that are killed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dipguard.store import Store
from tests.store.parts import guard, list_entries, smooth_images

ROOT = Path(__file__).resolve().parents[2]

WORK = """
import sys
from tests.store.parts import guard, smooth_images
from dipguard.store import Store
store = Store(sys.argv[1])
made = guard(store, T=120, stack_size=2)
print("ready", flush=True)
sys.stdin.readline()
got = made.purify(smooth_images(6))
print(store.counts["fitted"], float(got.double().sum()).hex(), flush=True)
"""


@pytest.mark.slow
def test_two_processes_make_each_fit_once(tmp_path: Path):
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stdin": subprocess.PIPE, "text": True}
    command, environment = [sys.executable, "-c", WORK, str(tmp_path)], {**os.environ, "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    wanted = guard(T=120).purify(smooth_images(6))
    store = Store(tmp_path)
    assert other.stdout.readline() == "ready\n"
    other.stdin.write("go\n")
    other.stdin.flush()
    got = guard(store, T=120, stack_size=2).purify(smooth_images(6))
    fitted, total = other.communicate(timeout=120)[0].split()
    assert store.counts["fitted"] + int(fitted) == 6
    assert torch.equal(got, wanted)
    assert total == float(wanted.double().sum()).hex()
    assert list(list_entries(tmp_path))  # each is read against its checksum


needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")


def start(work: Callable[[Path, Connection], None], path: Path) -> tuple[BaseProcess, Connection]:
    """A forked process, quick to begin; its work must leave torch alone, whose threads a fork does not take along."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=work, args=(path, there), daemon=True)
    process.start()
    return process, here


def hold(path: Path, pipe: Connection) -> None:
    with Store(path).claim(["a", "b"]) as mine:
        pipe.send(mine)
        pipe.recv()


@needs_fork
def test_locks_exclude_and_die_with_their_process(tmp_path: Path):
    holder, pipe = start(hold, tmp_path)
    assert pipe.recv() == {"a", "b"}
    store = Store(tmp_path)
    with store.claim(["a", "c"]) as mine:
        assert mine == {"c"}
    waited: list[set[str]] = []

    def wait() -> None:
        with store.claim(["a", "b"]) as mine:
            waited.append(mine)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.3)
    assert not waited
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    waiting.join(timeout=10)
    assert waited == [{"a"}]
    with store.claim(["a", "b"]) as mine:
        assert mine == {"a", "b"}


def write_again_and_again(path: Path, pipe: Connection) -> None:
    store = Store(path)
    images = np.zeros(5_000_000, np.float32)
    while True:
        store.write("fits", "abc", {"images": images}, {})
        store.file("fits", "abc").unlink()


@needs_fork
def test_a_process_that_is_killed_between_write_and_rename_leaves_no_entry(tmp_path: Path):
    store = Store(tmp_path)
    path = store.file("fits", "abc")
    writer, _ = start(write_again_and_again, tmp_path)
    until = time.monotonic() + 60
    while True:  # stop it where it has begun a file and has not renamed it yet
        assert time.monotonic() < until
        if list(path.parent.glob(".*.part")):
            os.kill(writer.pid, signal.SIGSTOP)
            time.sleep(0.05)
            if (begun := list(path.parent.glob(".*.part"))) and not path.exists():
                break
            os.kill(writer.pid, signal.SIGCONT)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert begun[0].is_file()
    assert not path.exists()
    assert store.read("fits", "abc") is None
    assert store.counts["damaged"] == 0
    store.write("fits", "abc", {"images": np.zeros(3)}, {})
    assert store.read("fits", "abc") is not None
