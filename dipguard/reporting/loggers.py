"""One log of a run: the course of its fits, then its results. The run folder's files are the truth, not this."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from dipguard.config import LoggerConfig
from dipguard.config_choices import LoggerName
from dipguard.evaluation.run_folder import flatten
from dipguard.reporting.wandb_run import results_to_wandb, wandb_run

_log = logging.getLogger(__name__)

MOST_FIGURES = 16
"""Figures that a remote log is given; all of them lie in the run folder."""


class RunLog(Logger):
    """A Lightning logger over all stacks of a run: many short Trainers write into one log.

    Args:
        inner: The logger that writes.
        first_step: Added to the Trainer's step numbers.
    """

    def __init__(self, inner: Logger, *, first_step: int = 0) -> None:
        super().__init__()
        self.inner = inner
        self.first_step = first_step

    @property
    def name(self) -> str | None:
        """The writing logger's name."""
        return self.inner.name

    @property
    def version(self) -> int | str | None:
        """The writing logger's version."""
        return self.inner.version

    def starting_at(self, first_step: int) -> RunLog:
        """The same log, for a fit whose step 0 is the run's ``first_step``."""
        return RunLog(self.inner, first_step=first_step)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write one line of figures."""
        number = None if step is None else self.first_step + step
        self._write(lambda: self.inner.log_metrics(dict(metrics), step=number))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: each stack's Trainer would enter its own; :func:`open_log` enters the run's, once."""

    def save(self) -> None:
        """Write out what is buffered."""
        self.inner.save()

    def finalize(self, status: str) -> None:
        """A Trainer ends, the run does not: the writing logger is closed by :func:`open_log`."""
        self.inner.save()

    def log_results(
        self, metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], figures: Sequence[Path]
    ) -> None:
        """Enter the final figures, the table of images and at most ``MOST_FIGURES`` pictures."""
        figures_of_merit = {
            f"result/{k}": v for k, v in flatten({k: v for k, v in metrics.items() if k != "settings"}).items()
        }
        if isinstance(self.inner, WandbLogger):
            run = self.inner.experiment
            self._write(lambda: results_to_wandb(run, figures_of_merit, rows, figures[:MOST_FIGURES]))
        elif isinstance(self.inner, TensorBoardLogger):
            _results_to_tensorboard(self.inner.experiment, figures_of_merit, rows, figures[:MOST_FIGURES])
        else:
            self.inner.log_metrics(figures_of_merit)

    def _write(self, call: Callable[[], None]) -> None:
        """What goes to W&B may fail, and the run shall not fail with it."""
        if not isinstance(self.inner, WandbLogger):
            call()
            return
        try:
            call()
        except Exception as error:
            _log.warning("W&B was not given some results: %s: %s", type(error).__name__, error)


@contextlib.contextmanager
def open_log(
    config: LoggerConfig,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    job_type: str = "fit",
    group: str | None = None,
) -> Iterator[RunLog | None]:
    """The run's log, closed on the way out whatever happens; None for ``none``.

    CSV files lie in ``logs/csv/<session>/``, TensorBoard's in ``logs/tensorboard/<session>/``, W&B's in
    ``logs/wandb/``. A continued run opens a new session, and with W&B online the run that it had.

    Args:
        config: Which log.
        folder: The run folder.
        settings: The run's settings, entered once.
        job_type: What W&B files the run under: ``fit``, ``evaluate`` or ``sweep``.
        group: The sweep that the run belongs to, for W&B; the config's own ``group`` comes first.
    """
    if config.name == LoggerName.none:
        yield None
        return
    if config.name == LoggerName.wandb:
        with wandb_run(config, folder, settings, job_type=job_type, group=group) as inner:
            yield RunLog(inner)
        return
    root = folder / "logs" / str(config.name)
    session = f"session_{len(list(root.glob('session_*'))) if root.is_dir() else 0}"
    local: CSVLogger | TensorBoardLogger
    if config.name == LoggerName.csv:
        local = CSVLogger(root, name="", version=session)
    else:
        local = TensorBoardLogger(root, name="", version=session)
    status = "failed"
    try:
        local.log_hyperparams(flatten(settings))
        yield RunLog(local)
        status = "success"
    finally:
        local.save()
        local.finalize(status)


def _results_to_tensorboard(
    writer: Any, metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]], figures: Sequence[Path]
) -> None:
    from matplotlib.image import imread

    for name, value in metrics.items():
        writer.add_scalar(name, value)
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row[c]) for c in columns] for row in rows)]
    writer.add_text("images", "\n".join(f"| {' | '.join(line)} |" for line in lines))
    for path in figures:
        writer.add_image(f"figures/{path.stem}", imread(path)[..., :3], dataformats="HWC")
