"""A sweep as Hydra runs it: its jobs, how many are done, how long the rest will take, and the report at its end.

All is read from the sweep's folder, so jobs may run elsewhere: ``sweep.json`` lists them, and the folder of each says
how it ended.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from dipguard.cli import CommandError, locked
from dipguard.config import check_overrides, from_hydra
from dipguard.evaluation.sweep_job import DONE, FAILED, PLAN, digest_of, job_folder, plan_of, without_aside
from dipguard.files import write_json

_log = logging.getLogger("dipguard")

RESOLVER = "sweep_job"
"""``${sweep_job:${hydra.overrides.task}}`` is a job's folder."""

_open: list[tuple[Path, ExitStack]] = []
"""Sweeps of this process that have no report yet, with the locks of their folders."""


def register_resolver() -> None:
    """Register ``${sweep_job:...}`` with OmegaConf; harmless when repeated."""
    OmegaConf.register_new_resolver(RESOLVER, lambda overrides: job_folder(list(overrides)), replace=True)


class SweepProgress(Callback):
    """Hydra callback that writes the plan of a sweep, logs its progress and writes its report."""

    def __init__(self) -> None:
        register_resolver()

    def __reduce__(self) -> tuple[type[SweepProgress], tuple[()]]:
        # A launcher's other process unpickles this, and needs the resolver before it can name its folder.
        return SweepProgress, ()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the jobs and write their list."""
        folder, lock = _folder(config), ExitStack()
        try:
            if (given := config.hydra.output_subdir) != ".hydra":  # the report is made from it
                raise ValueError(f"`hydra.output_subdir` must be .hydra in a sweep, got {given}")
            if isinstance(config.hydra.sweeper.get("direction"), Enum):  # Optuna's own default, minimize
                raise ValueError(
                    "`hydra.sweeper.direction` must be given, mostly as maximize: `objective` is an accuracy"
                )
            jobs = planned_jobs(config)
            check_jobs(config, jobs or [])
            lock.enter_context(locked(folder))
        except (CommandError, TypeError, ValueError, HydraException) as error:  # of which Hydra would make a warning
            raise SystemExit(f"{error}\nNo job was started.") from None
        earlier = plan_of(folder)
        before = earlier.get("base")
        base = before if config.get("rebuild") else _base(config)  # a rebuild runs no job
        if before not in (None, base):
            for job in jobs or []:  # what is done may have been done with other settings
                (folder / job["folder"] / DONE).unlink(missing_ok=True)
        left_out = {job["folder"] for job in earlier.get("jobs") or []} - {job["folder"] for job in jobs or []}
        if jobs and left_out:
            _log.info(
                "sweep %s: %d jobs of the sweep that had this folder before are not in this one, whose report replaces "
                "theirs; hydra.sweep.dir=FOLDER keeps sweeps apart", folder, len(left_out)
            )  # fmt: skip
        name = config.hydra.runtime.choices.get("sweep")
        write_json(folder / PLAN, {"began": time.time(), "sweep": name, "base": base, "jobs": jobs})
        _open.append((folder, lock))
        if jobs:
            done = sum((folder / job["folder"] / DONE).is_file() for job in jobs)
            _log.info("sweep %s: %d jobs, %d of them done before", folder, len(jobs), done)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Log the progress of the sweep."""
        if config.hydra.mode == RunMode.MULTIRUN:
            _log.info("%s", progress_line(_folder(config)))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write the sweep's report."""
        report_open_sweeps()


def report_open_sweeps() -> None:
    """Write the reports of this process's sweeps; Hydra does not call its callbacks after a failed job or Ctrl-C."""
    while _open:
        folder, lock = _open.pop()
        with lock:
            if any(folder.glob("*/.hydra")):  # else Hydra refused it
                _report(folder)


def _report(folder: Path) -> None:
    from dipguard.reporting.sweep_report import summary, write_sweep_report

    try:
        write_sweep_report(folder)
        _log.info("%s", summary(folder))
    except (OSError, ValueError) as error:  # it must not hide the error that ended the sweep
        _log.warning("sweep %s could not be reported: %s", folder, error)


def planned_jobs(config: DictConfig) -> list[dict[str, Any]] | None:
    """The jobs of Hydra's basic sweeper, each with its overrides and folder; None for other sweepers."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    sweeper: Any = OmegaConf.to_container(config.hydra.sweeper)
    subdir = OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"]  # type: ignore[index,call-overload]
    if not str(sweeper["_target_"]).endswith("BasicSweeper") or RESOLVER not in subdir:
        return None
    given = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    loader = GlobalHydra.instance().config_loader()  # for glob(...)
    asked: Any = OmegaConf.to_container(config.hydra.overrides.task)  # with ${...} as it was given
    overrides = OverridesParser.create(loader).parse_overrides([*given, *asked])
    (batch,) = BasicSweeper.split_arguments(overrides, None)
    return [{"folder": job_folder(job), "overrides": list(job)} for job in batch]


def check_jobs(config: DictConfig, jobs: Sequence[Mapping[str, Any]]) -> None:
    """Compose and check the first job with each key and each choice of a config group; all would take long.

    Jobs that would share a folder are refused: only one of them would run.
    """
    first: dict[str, Mapping[str, Any]] = {}
    for job in jobs:
        if (other := first.setdefault(job["folder"], job)) is not job:
            both = " and ".join(" ".join(one["overrides"]) for one in (other, job))
            raise ValueError(f"a sweep's jobs must differ in what a result depends on, got {both}")
    seen: set[str] = set()
    loader = GlobalHydra.instance().config_loader()
    is_group = cache(lambda key: bool(loader.get_group_options(key)))
    for job in jobs:
        pairs = [(text, *text.partition("=")[::2]) for text in job["overrides"]]
        # Of a plain value, the key stands for all.
        shapes = {
            text if value.startswith("{") or is_group(key.lstrip("+~").split("@")[0]) else key
            for text, key, value in pairs
        }
        if not shapes <= seen:
            composed = loader.load_sweep_config(config, list(job["overrides"]))
            with open_dict(composed):  # what Hydra would set, for ${hydra:...}
                composed.hydra.job.num, composed.hydra.job.id = 0, "0"
                composed.hydra.runtime.output_dir = job["folder"]
            HydraConfig.instance().set_config(composed)
            try:
                check_overrides(composed, job["overrides"])
                from_hydra(OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"]))
            finally:
                HydraConfig.instance().cfg = None
        seen |= shapes


def _folder(config: DictConfig) -> Path:
    """The sweep's folder; a job may have another working directory."""
    return Path(config.hydra.runtime.cwd) / config.hydra.sweep.dir


def _base(config: DictConfig) -> str:
    """A digest of the sweep's YAML: of the settings without other overrides, which the jobs' folders are named by."""
    given: Any = OmegaConf.to_container(config.hydra.overrides.task)  # with ${...} as it was given
    asked = [text for text in given if re.match(r"\+*sweep=", text)]
    values: Any = OmegaConf.to_container(GlobalHydra.instance().config_loader().load_sweep_config(config, asked))
    values.pop("hydra")
    return digest_of(without_aside(values))


def progress_line(folder: Path) -> str:
    """How many jobs are done and failed, and the time left."""
    plan = plan_of(folder)
    names = [job["folder"] for job in plan.get("jobs") or []]
    if not names:
        return f"{len(list(folder.glob(f'*/{DONE}')))} jobs done"
    began = float(plan["began"])
    marks = {m: [p.stat().st_mtime for n in names if (p := folder / n / m).is_file()] for m in (DONE, FAILED)}
    # A failure of an earlier start will be tried again.
    done, failed = len(marks[DONE]), sum(end >= began for end in marks[FAILED])
    left, ended = len(names) - done - failed, sum(end >= began for end in marks[DONE]) + failed
    text = f"{done} of {len(names)} jobs done" + (f", {failed} failed" if failed else "")
    if left and ended:
        text += f", {timedelta(seconds=round((time.time() - began) * left / ended))} left"
    return text
