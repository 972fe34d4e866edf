"""One log for a whole run: the curves of its fits, then its results. It is a copy; the run folder's files count."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.image import imread
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from dipguard.reporting.results import flatten
from dipguard.reporting.wandb_run import results_to_wandb, wandb_run

_log = logging.getLogger(__name__)

MOST_FIGURES = 16
"""Most figures that a log is given; all of them are in the run folder."""


class RunLog(Logger):
    """A Lightning logger that collects all stacks of a run: many short Trainers write into one log.

    Args:
        inner: The logger that writes.
        first_step: Added to the Trainer's step numbers.
    """

    def __init__(self, inner: Logger, *, first_step: int = 0) -> None:
        super().__init__()
        self.inner = inner
        self.first_step = first_step

    name = property(lambda self: self.inner.name)
    version = property(lambda self: self.inner.version)

    def starting_at(self, first_step: int) -> RunLog:
        """The same log, for a fit whose step 0 is the run's ``first_step``."""
        return RunLog(self.inner, first_step=first_step)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write one line of metrics."""
        with self._wandb_may_fail():
            self.inner.log_metrics(dict(metrics), step=None if step is None else self.first_step + step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `open_log` enters the run's settings once, instead of those of each stack's Trainer."""

    def save(self) -> None:
        """Write out what is buffered."""
        self.inner.save()

    def finalize(self, status: str) -> None:
        """Write out what is buffered; `open_log` closes the inner logger at the end of the run."""
        self.inner.save()

    def log_results(
        self, metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], figures: Sequence[Path]
    ) -> None:
        """Enter the final metrics, the table of images and at most ``MOST_FIGURES`` figures."""
        final = flatten({f"result/{name}": value for name, value in metrics.items() if name != "settings"})
        figures = figures[:MOST_FIGURES]
        if isinstance(self.inner, WandbLogger):
            with self._wandb_may_fail():
                results_to_wandb(self.inner.experiment, final, rows, figures)
        elif isinstance(self.inner, TensorBoardLogger):
            writer: Any = self.inner.experiment
            for name, value in final.items():
                writer.add_scalar(name, value)
            writer.add_text("images", pd.DataFrame(rows).to_markdown(index=False))
            for path in figures:
                writer.add_image(f"figures/{path.stem}", imread(path)[..., :3], dataformats="HWC")
        else:
            self.inner.log_metrics(final)

    @contextlib.contextmanager
    def _wandb_may_fail(self) -> Iterator[None]:
        """A failure of W&B must not end the run."""
        try:
            yield
        except Exception as error:
            if not isinstance(self.inner, WandbLogger):
                raise
            _log.warning("W&B was not given some results: %s: %s", type(error).__name__, error)


@contextlib.contextmanager
def open_log(
    config: Mapping[str, Any],
    folder: Path,
    *,
    settings: Mapping[str, Any],
    job_type: str = "fit",
    group: str | None = None,
) -> Iterator[RunLog | None]:
    """The run's log, closed at the end in any case; None for ``none``.

    CSV files are in ``logs/csv/<session>/``, TensorBoard's in ``logs/tensorboard/<session>/``, W&B's in
    ``logs/wandb/``. A resumed run opens a new session, and with W&B online its old run.

    Args:
        config: ``name`` (``csv``, ``tensorboard``, ``wandb`` or ``none``); for W&B also ``project``, ``entity``,
            ``group`` and ``offline``.
        folder: The run folder.
        settings: The run's settings, entered once.
        job_type: W&B's type of the run: ``fit``, ``evaluate`` or ``sweep``.
        group: The sweep of the run, for W&B; the config's own ``group`` takes precedence.
    """
    name = config["name"]
    if name == "none":
        yield None
    elif name == "wandb":
        with wandb_run(config, folder, settings, job_type=job_type, group=group) as inner:
            yield RunLog(inner)
    else:
        root = folder / "logs" / name
        session = f"session_{len(list(root.glob('session_*')))}"
        local = (CSVLogger if name == "csv" else TensorBoardLogger)(root, name="", version=session)
        status = "failed"
        try:
            local.log_hyperparams(flatten(settings))
            yield RunLog(local)
            status = "success"
        finally:
            local.save()
            local.finalize(status)
