"""One job of a sweep: the name of its folder, the key of its settings, and how it ended.

    DONE     written last: the job is finished, with the key of its settings
    FAILED   the job ended in an error, with its traceback
    neither  it has not run yet, is running, or was killed

Hydra cannot resume a sweep: here a job that is DONE with the same settings returns at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dipguard.config import RunConfig
from dipguard.version import __version__

DONE, FAILED = "DONE", "FAILED"
ASIDE = (
    "logger", "trainer.accelerator", "trainer.enable_progress_bar", "store", "store_T", "store_samples", "processes",
    "rebuild",
)  # fmt: skip
"""Settings that no result depends on: a finished job stays finished when they change."""
NAME_LENGTH = 100
"""Of the readable part of a folder's name; file systems allow 255 bytes."""


def job_folder(overrides: Sequence[str]) -> str:
    """The name of a job's folder: its overrides in a readable form, and a digest of them.

    ``defense.tau=0.5`` and ``defense={tau:0.5}`` both read ``tau=0.5``. The sweep's own name and settings that no
    result depends on are left out, so that a sweep can be continued with another logger.

    Args:
        overrides: The job's overrides, as on the command line.
    """
    kept = [text.lstrip("+") for text in overrides]
    kept = [text for text in kept if not _is_aside(text) and not text.startswith("sweep=")]
    digest = hashlib.sha256("\n".join(sorted(kept)).encode()).hexdigest()[:8]
    name = ",".join(_readable(text) for text in kept) or "job"
    return f"{name[:NAME_LENGTH].rstrip(',.')}-{digest}"


def _is_aside(override: str) -> bool:
    key = re.split("[=@/]", override.lstrip("~"), maxsplit=1)[0]
    return any(key == name or key.startswith(f"{name}.") for name in ASIDE)


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


def job_key(config: RunConfig) -> str:
    """A digest of a job's settings, of the files that they name, and of dipguard's version.

    A file counts by its size and time of change, since nothing is read here. After a touched file its jobs run again,
    but not their cells, whose keys depend on what the files hold.
    """
    values = config.to_dict()
    for name in ASIDE:
        group, _, key = name.rpartition(".")
        (values[group] if group else values).pop(key, None)
    state = {"settings": values, "files": sorted(_files(values)), "version": __version__}
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()


def _files(values: Any) -> Iterator[tuple[str, int, int]]:
    if isinstance(values, dict):
        for value in values.values():
            yield from _files(value)
    elif isinstance(values, str) and ("/" in values or "\\" in values or "." in values) and Path(values).exists():
        state = Path(values).stat()
        yield values, state.st_size, state.st_mtime_ns


def is_done(folder: Path, key: str) -> bool:
    """Whether the job with this key is finished in this folder."""
    from dipguard.files import read_json  # here and below: torch is not loaded for --help

    try:
        return bool(read_json(folder / DONE)["key"] == key) and (folder / "results.csv").is_file()
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def mark_begun(folder: Path) -> None:
    """The job begins: remove the marks of an earlier one."""
    for name in (DONE, FAILED):
        (folder / name).unlink(missing_ok=True)


def mark_done(folder: Path, key: str, *, seconds: float) -> None:
    """The job is finished; this is the last file of its folder."""
    from dipguard.files import write_json

    write_json(folder / DONE, {"key": key, "seconds": round(seconds, 3)})


def mark_failed(folder: Path, error: BaseException) -> None:
    """The job ended in an error."""
    from dipguard.files import write_json

    lines = traceback.format_exception(error)
    write_json(folder / FAILED, {"error": type(error).__name__, "message": str(error), "traceback": "".join(lines)})


@contextmanager
def isolated() -> Iterator[None]:
    """Restore the process for the next job: random states, environment, threads, gradient mode, number format."""
    import numpy as np
    import torch

    environment, threads, dtype = dict(os.environ), torch.get_num_threads(), torch.get_default_dtype()
    gradients, deterministic = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
    # Not Lightning's isolate_rng, which restores nothing after an exception.
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        # W&B's helper process serves all jobs: without its address the next job would start another.
        kept = {name: value for name, value in os.environ.items() if name == "WANDB_SERVICE"}
        for name in os.environ.keys() - environment.keys() - kept.keys():
            del os.environ[name]
        os.environ.update(environment | kept)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        torch.use_deterministic_algorithms(deterministic)
