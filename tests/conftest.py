"""What every test may use: the folder of real images, a temporary cache, and a known state of RNGs and threads."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for torch.use_deterministic_algorithms on a GPU

import torch

REAL_DATA = "DIPGUARD_TEST_DATA"
MAX_THREADS = 4


def real_data_folder() -> tuple[Path | None, str]:
    """The folder of real images and weights, or None, and a sentence that says which."""
    value = os.environ.get(REAL_DATA, "")
    if not value:
        return None, f"{REAL_DATA} is not set: tests on real images and weights are skipped"
    folder = Path(value).expanduser().resolve()
    if not folder.is_dir():
        return None, f"{REAL_DATA}={value} is not a folder: tests on real images and weights are skipped"
    return folder, f"real images and weights from {folder}"


def pytest_report_header() -> str:
    return f"dipguard: {real_data_folder()[1]}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With -q pytest leaves out the header, and whether real data was used must never be a guess."""
    if terminalreporter.verbosity < 0:
        terminalreporter.write_line(pytest_report_header())


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real images and weights; the test is skipped where there is none."""
    folder, reason = real_data_folder()
    if folder is None:
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session", autouse=True)
def keep_out_of_the_home_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Cached victims go to a temporary folder; figures need no screen; W&B never calls its server."""
    base = tmp_path_factory.getbasetemp()
    # All workers of a run share the trained digits victim and the compiled engine.
    cache = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIPGUARD_CACHE", str(cache / "cache"))
        patch.setenv("MPLBACKEND", "Agg")
        patch.setenv("WANDB_MODE", "offline")
        yield


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> Iterator[None]:
    """No more threads than cores we may use, shared among pytest-xdist's workers.

    A container may show many cores and grant few, and threads that wait for each other's cores take many times as long.
    """
    before = torch.get_num_threads()
    granted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(before, granted // workers, MAX_THREADS)))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """A shell starts its background jobs deaf to Ctrl-C, and Python and its children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def known_state() -> Iterator[None]:
    """Each test starts from seed 0 and leaves threads, grad mode, dtype, device and RNGs behind as it found them."""
    threads, grad, dtype = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
