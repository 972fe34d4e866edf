"""One job of a sweep: what its folder is called, what it is known by, and how it ended.

    DONE     written last: the job is finished, and with which settings
    FAILED   the job ended in an error, and which
    neither  it was not run yet, is running, or was killed

Hydra has no resume of its own: a sweep goes on where it was, because a job that is DONE with the same settings returns
at once.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dipguard.config_matrix import MatrixConfig
from dipguard.evaluation.cells import key_of
from dipguard.files import read_json, write_json
from dipguard.version import __version__

DONE, FAILED = "DONE", "FAILED"
ASIDE = ("logger", "log_figures", "trainer", "store", "store_T", "store_samples", "processes", "rebuild")
"""Settings that no result depends on: with others of them a finished job is still finished."""
MOST_LETTERS = 100
"""Of the readable part of a folder's name; file systems allow 255 bytes."""


def job_folder(overrides: Sequence[str]) -> str:
    """A job's folder: what was overridden, as far as it is readable, and a digest of all of it.

    ``rows.paper.options.tau=0.5`` and ``rows.paper.options={tau:0.5}`` both read ``tau=0.5``. The sweep's own name and
    settings that no result depends on play no role, so that a sweep can be gone on with under another logger.

    Args:
        overrides: The job's overrides, as on the command line.
    """
    kept = [text.lstrip("+") for text in overrides]
    kept = [text for text in kept if _root(text) not in (*ASIDE, "sweep")]
    digest = hashlib.sha256("\n".join(sorted(kept)).encode()).hexdigest()[:8]
    name = ",".join(_readable(text) for text in kept) or "job"
    return f"{name[:MOST_LETTERS].rstrip(',.')}-{digest}"


def _root(override: str) -> str:
    return re.split(r"[.=@/]", override.lstrip("~"), maxsplit=1)[0]


def _readable(override: str) -> str:
    key, _, value = override.partition("=")
    short = re.split(r"[./@]", key)[-1]
    if key.startswith("~"):
        text = f"no_{short.lstrip('~')}"
    elif value.startswith("{") and value.endswith("}"):
        text = value[1:-1].replace(":", "=").replace(" ", "")
    else:
        text = f"{short}={value.rstrip('/').rsplit('/', 1)[-1]}"
    return re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", text)


def job_key(config: MatrixConfig) -> str:
    """What a job is known by: a digest of its settings, of the files that they name, and of dipguard's version.

    A file counts by its size and time of change, since nothing is read here. One that was only touched makes its jobs
    run again, which is cheap: their cells are known by what the files hold.
    """
    values = config.to_dict()
    for name in ASIDE:
        values.pop(name, None)
    return key_of(settings=values, files=sorted(_files(values)), version=__version__)


def _files(values: Any) -> Iterator[tuple[str, int, int]]:
    if isinstance(values, dict):
        for value in values.values():
            yield from _files(value)
    elif isinstance(values, str) and ("/" in values or "\\" in values or "." in values) and Path(values).exists():
        state = Path(values).stat()
        yield values, state.st_size, state.st_mtime_ns


def is_done(folder: Path, key: str) -> bool:
    """Whether the job of these settings is finished in this folder."""
    try:
        return bool(read_json(folder / DONE)["key"] == key) and (folder / "results.csv").is_file()
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def mark_begun(folder: Path) -> None:
    """The job begins: however an earlier one ended, it is not the state any more."""
    for name in (DONE, FAILED):
        (folder / name).unlink(missing_ok=True)


def mark_done(folder: Path, key: str, *, seconds: float) -> None:
    """The job is finished; nothing is written into its folder after this."""
    write_json(folder / DONE, {"key": key, "seconds": round(seconds, 3)})


def mark_failed(folder: Path, error: BaseException) -> None:
    """The job ended in an error."""
    lines = traceback.format_exception(error)
    write_json(folder / FAILED, {"error": type(error).__name__, "message": str(error), "traceback": "".join(lines)})


@contextmanager
def isolated() -> Iterator[None]:
    """Leave the process to the next job as it was: random states, environment, threads, gradients, number format."""
    environment, threads, dtype = dict(os.environ), torch.get_num_threads(), torch.get_default_dtype()
    gradients, deterministic = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
    # Not Lightning's isolate_rng, which leaves the states as they are when something is raised.
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        # W&B's helper process is one for all jobs: without its address the next job would start another.
        kept = {name: value for name, value in os.environ.items() if name == "WANDB_SERVICE"}
        for name in os.environ.keys() - environment.keys() - kept.keys():
            del os.environ[name]
        os.environ.update(environment | kept)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        torch.use_deterministic_algorithms(deterministic)
