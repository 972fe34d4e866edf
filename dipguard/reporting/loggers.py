"""One log of a run: the course of its fits, then its results. The run folder's files are the truth, not this."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from dipguard.config import LoggerConfig
from dipguard.config_choices import LoggerName
from dipguard.evaluation.run_folder import flatten
from dipguard.files import write_text

MOST_FIGURES = 16
"""Figures that a remote log is given; all of them lie in the run folder."""
_WandbMode = Literal["online", "offline", "disabled", "shared"]


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
        self.inner.log_metrics(dict(metrics), step=None if step is None else self.first_step + step)

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
            _results_to_wandb(self.inner.experiment, figures_of_merit, rows, figures[:MOST_FIGURES])
        elif isinstance(self.inner, TensorBoardLogger):
            _results_to_tensorboard(self.inner.experiment, figures_of_merit, rows, figures[:MOST_FIGURES])
        else:
            self.inner.log_metrics(figures_of_merit)


@contextlib.contextmanager
def open_log(config: LoggerConfig, folder: Path, *, settings: Mapping[str, Any]) -> Iterator[RunLog | None]:
    """The run's log, closed on the way out whatever happens; None for ``none``.

    CSV files lie in ``logs/csv/<session>/``, TensorBoard's in ``logs/tensorboard/<session>/``, W&B's in
    ``logs/wandb/``. A continued run opens a new session, and with W&B online the run that it had.

    Args:
        config: Which log.
        folder: The run folder.
        settings: The run's settings, entered once.
    """
    if config.name == LoggerName.none:
        yield None
        return
    if config.name == LoggerName.wandb:
        with _wandb_run(config, folder, settings) as inner:
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


@contextlib.contextmanager
def _wandb_run(config: LoggerConfig, folder: Path, settings: Mapping[str, Any]) -> Iterator[WandbLogger]:
    import wandb

    mode = _wandb_mode(config.offline)
    place = folder / "logs"
    place.mkdir(parents=True, exist_ok=True)
    # A run of our own, made here: WandbLogger would join a run that is open in this process, and its offline=True would
    # set the mode of the whole process.
    run = wandb.init(
        dir=place,
        project=config.project,
        entity=config.entity,
        group=config.group,
        name=folder.name,
        id=_run_id(folder),
        resume="allow" if mode == "online" else None,
        mode=mode,
        config=dict(settings),
        reinit="create_new",
    )
    code = 1
    try:
        yield WandbLogger(experiment=run, save_dir=place, project=config.project)
        code = 0
    finally:
        run.finish(exit_code=code)


def _wandb_mode(offline: bool | None) -> _WandbMode:
    if offline is not None:
        return "offline" if offline else "online"
    wanted = os.environ.get("WANDB_MODE")
    for mode in get_args(_WandbMode):
        if wanted == mode:
            return cast(_WandbMode, mode)
    return "online" if "WANDB_API_KEY" in os.environ else "offline"


def _run_id(folder: Path) -> str:
    path = folder / "logs" / "wandb_id.txt"
    if not path.is_file():
        write_text(path, secrets.token_hex(4))
    return path.read_text().strip()


def _results_to_wandb(
    run: Any, metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]], figures: Sequence[Path]
) -> None:
    import wandb

    run.summary.update(dict(metrics))
    columns = list(rows[0])
    pictures = {f"figures/{path.stem}": wandb.Image(str(path)) for path in figures}
    run.log(
        {"images": wandb.Table(columns=list(columns), data=[[row[c] for c in columns] for row in rows]), **pictures}
    )


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
