"""Small real sweeps for the tests: Hydra's own multirun, in this process or another, over jobs of a second."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from dipguard.cli.programs import evaluate, run_job, train
from dipguard.cli.sweep_progress import register_resolver, report_open_sweeps
from dipguard.config import register
from tests.tiny_run import CONF, ROOT

FAST = (
    "data.limit=3", "defense=jpeg", "~attacks.fgsm_8", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false",
    "figures=0",
)  # fmt: skip
"""One defence, JPEG, that needs no fit."""
GRID = ("defense.quality=30,90", "attacks.pgd_8.steps=1,2")
"""Two parameters, four jobs."""


def run_sweep(folder: Path, *overrides: str, program: str = "evaluate") -> None:
    """``evaluate.py -m`` or ``train.py -m`` in this process; its logging is left as it was."""
    register()
    register_resolver()
    task = partial(run_job, {"evaluate": evaluate, "train": train}[program])
    with logging_kept(), initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            GlobalHydra.instance().hydra.multirun(
                config_name=program,
                task_function=task,
                overrides=["hydra.mode=MULTIRUN", f"hydra.sweep.dir={folder}", *overrides],
            )
        finally:
            report_open_sweeps()


@contextmanager
def logging_kept() -> Iterator[None]:
    """Hydra sets up the root logger for each job."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers, root.level = handlers, level


def command(folder: Path, *overrides: str) -> list[str]:
    """The same as a command."""
    return [sys.executable, str(ROOT / "evaluate.py"), "-m", f"hydra.sweep.dir={folder}", *overrides]


def environment() -> dict[str, str]:
    """For another process: few threads, and ours to import."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def call(arguments: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(arguments, env=environment(), cwd=cwd, capture_output=True, text=True, check=False)


def done_times(folder: Path) -> dict[str, int]:
    """When each finished job was finished."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/DONE")}
