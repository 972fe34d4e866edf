"""Lightning's loggers for a run, and the rows that go into them. A log is a copy; the run folder's files count."""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.image import imread
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from dipguard.config import RunConfig
from dipguard.evaluation.cell import name_of
from dipguard.files import write_text
from dipguard.reporting.results import flatten
from dipguard.version import __version__

_log = logging.getLogger(__name__)

Columns: TypeAlias = Mapping[str, Sequence[Tensor | None]]
NO_PICTURES: Mapping[str, Path] = {}
CODE = Path(__file__).resolve().parents[2]
CELLS = "cells/done"
"""Number of finished cells: the axis of what is logged when a cell is finished."""
WANDB_SETTINGS: dict[str, Any] = {"init_timeout": 30.0, "finish_timeout": 120.0, "console": "off", "silent": True}
"""After these seconds without W&B's server, the run or the rest of it is kept offline. The terminal is not captured:
that would outlive the job in a process with several jobs."""


class Rows:
    """Rows of metrics and pictures on their way into a Lightning logger, each of them once.

    A row has a key. A resumed run folder goes on with its W&B run, so the keys of W&B's rows are kept in ``journal``,
    after the run's id in the first line. CSV and TensorBoard get a new log, with all rows.
    """

    def __init__(self, inner: Logger, journal: Path | None = None) -> None:
        self.inner, self.journal = inner, journal
        self.keys = set() if journal is None else set(journal.read_text(encoding="utf-8").splitlines()[1:])
        self.run: Any = inner.experiment if isinstance(inner, WandbLogger) else None
        self._earlier = len(self.keys)
        self._axes: set[str] = set()

    def claim(self, key: str) -> bool:
        """Note a key; False if it was there already."""
        if key in self.keys:
            return False
        self.keys.add(key)
        if self.journal is not None:  # before the row: a killed run may lack a row, and has none twice
            with self.journal.open("a", encoding="utf-8") as file:
                file.write(f"{key}\n")
        return True

    def add(
        self,
        key: str,
        metrics: Mapping[str, Any],
        *,
        step: int | None = None,
        pictures: Mapping[str, Path] = NO_PICTURES,
    ) -> None:
        """Log a row, unless one of this key is there. Pictures go to TensorBoard and W&B."""
        if not self.claim(key):
            return
        with self._as_copy():
            if self.run is not None:
                import wandb

                row = {**metrics, **{name: wandb.Image(str(path)) for name, path in pictures.items()}}
                if CELLS in row:  # by name: W&B takes any one of the patterns that match, and Lightning has set "*"
                    step = None
                    for name in row.keys() - self._axes:
                        self.run.define_metric(name, step_metric=CELLS)
                    self._axes |= row.keys()
                self._to_wandb(row, step=step)
                return
            if metrics:
                self.inner.log_metrics(dict(metrics), step=step)
            if isinstance(self.inner, TensorBoardLogger):
                for name, path in pictures.items():
                    self.inner.experiment.add_image(name, imread(path)[..., :3], step, dataformats="HWC")

    def table(self, key: str, rows: pd.DataFrame, pictures: Callable[[], Columns]) -> None:
        """Log the table of images: as text into TensorBoard, and into W&B with columns of pictures [3, H, W]."""
        if isinstance(self.inner, TensorBoardLogger):
            self.inner.experiment.add_text("images", rows.to_markdown(index=False))
        elif self.run is not None and self.claim(key):
            import wandb

            with self._as_copy():
                shown = {
                    name: [None if x is None else wandb.Image(_pixels(x)) for x in column]
                    for name, column in pictures().items()
                }
                self._to_wandb({"images": wandb.Table(dataframe=rows.astype(object).assign(**shown))})

    def upload(self, key: str, name: str, fill: Callable[[Any], None]) -> None:
        """Give W&B an artifact that ``fill`` adds files to; its size is logged before."""
        if self.run is None or not self.claim(key):
            return
        import wandb

        with self._as_copy():
            artifact = wandb.Artifact(f"{name}-{self.run.id}", type=name)
            fill(artifact)
            count, size = len(artifact.manifest.entries), artifact.size / 1e6
            _log.info("W&B artifact %s: %d files, %.1f MB", artifact.name, count, size)
            self.run.log_artifact(artifact)

    def summarise(self, metrics: Mapping[str, Any]) -> None:
        """Complete W&B's summary, which a resumed offline run would begin anew."""
        if self.run is not None:
            with self._as_copy():
                self.run.summary.update(dict(metrics))

    def save(self) -> None:
        """Write out what is buffered."""
        self.inner.save()

    def _to_wandb(self, row: Mapping[str, Any], *, step: int | None = None) -> None:
        if self.run.step < self._earlier:  # a new offline record would count its rows from 0 again
            self.run.log({}, step=self._earlier, commit=False)
        self._earlier = 0
        self.inner.log_metrics(dict(row), step=step)

    @contextlib.contextmanager
    def _as_copy(self) -> Iterator[None]:
        """A failure of W&B does not end the run."""
        try:
            yield
        except Exception as error:
            if self.run is None:
                raise
            _log.warning("W&B was not given some results: %s: %s", type(error).__name__, error)


def _pixels(image: Tensor) -> np.ndarray[Any, Any]:
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


@contextlib.contextmanager
def open_rows(config: RunConfig, folder: Path, *, job_type: str, group: str | None) -> Iterator[Rows | None]:
    """The rows of the logger that the config asks for, closed at the end in any case; None for ``none``.

    CSV files are in ``logs/csv/<session>/``, TensorBoard's in ``logs/tensorboard/<session>/``, W&B's in
    ``logs/wandb/``. A resumed run opens a new session, and goes on with its W&B run.

    Args:
        config: The settings; its ``logger`` has the ``kind`` and the options of that logger.
        folder: The run folder.
        job_type: For W&B: ``fit``, ``evaluate`` or ``sweep``.
        group: For W&B: the sweep.
    """
    kind, inner, rows = config.logger["kind"], None, None
    if kind == "none":
        yield None
        return
    if kind == "wandb":
        inner, journal = _open_wandb(config, folder, job_type=job_type, group=group)
        rows = Rows(inner, None if inner.experiment.disabled else journal)
    else:
        root = folder / "logs" / kind
        session = f"session_{len(list(root.glob('session_*')))}"
        rows = Rows((CSVLogger if kind == "csv" else TensorBoardLogger)(root, name="", version=session))
    status = "failed"
    try:
        rows.inner.log_hyperparams(flat_settings(config))
        yield rows
        status = "success"
    finally:
        rows.save()
        rows.inner.finalize(status)
        if rows.run is not None:
            _close(rows.run, exit_code=int(status == "failed"))


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """The settings with keys like ``defense/tau`` if there is one defence, else ``defenses/paper/tau``.

    W&B's plots do not find keys with dots.
    """
    values = {name: value for name, value in config.to_dict().items() if name != "logger"}
    for many, one in (("attacks", "attack"), ("defenses", "defense")):
        if len(values[many]) == 1:
            (values[one],) = values.pop(many).values()
    return {"version": __version__, "code": code_state(), **flatten(values, sep="/")}


def code_state() -> str | None:
    """The commit of the code, followed by ``-dirty`` if files differ from it; None outside of a repository."""
    command = ["git", "-C", str(CODE), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run_name(config: RunConfig, folder: Path, *, group: str | None) -> str:
    """A readable name: a sweep's job by its overrides, other runs by data, victim, attacks and defences."""
    if group is not None:
        return re.sub(r"-[0-9a-f]{8}$", "", folder.name)
    many = [("attacks", list(config.attacks)), ("defences", list(config.defenses))]
    what = [labels[0] if len(labels) == 1 else f"{len(labels)} {kind}" for kind, labels in many]
    victim = config.victim.get("arch") or name_of(config.victim)
    between = "-" if all(len(labels) == 1 for _, labels in many) else " x "
    return "-".join([name_of(config.data), str(victim), between.join(what)])


def wandb_mode(offline: bool | None) -> str:
    """The mode that was asked for, else that of W&B's own settings; but offline if there is no key for online."""
    import wandb
    from requests.utils import get_netrc_auth

    own = wandb.setup().settings
    key = own.api_key or get_netrc_auth(own.base_url)
    return {True: "offline", False: "online", None: own.mode if key or own.mode != "online" else "offline"}[offline]


def _open_wandb(config: RunConfig, folder: Path, *, job_type: str, group: str | None) -> tuple[WandbLogger, Path]:
    """Lightning's logger with its run, and the run's journal; offline if the server is out of reach or refuses the key.

    What the config leaves open is as W&B's own settings say (``WANDB_NAME``, ``WANDB_PROJECT``, ...).
    """
    import wandb

    own, asked = wandb.setup().settings, config.logger
    known = wandb.Settings.model_fields  # older versions do not know all settings
    # W&B looks for a repository around the folder of its files, which may be anywhere.
    settings = {**WANDB_SETTINGS, "git_root": own.git_root or str(CODE)}
    options: dict[str, Any] = {
        "save_dir": folder / "logs",
        "name": asked["name"] or own.run_name or run_name(config, folder, group=group),
        "project": asked["project"] or own.project or "dipguard",
        "entity": asked["entity"],
        "group": asked["group"] or own.run_group or group,
        "job_type": own.run_job_type or job_type,
        "tags": asked["tags"],
        "notes": asked["notes"],
        "reinit": "create_new",  # the run of the next job in this process is another one
        "settings": wandb.Settings(**{name: value for name, value in settings.items() if name in known}),
    }
    journal = folder / "logs" / "wandb_run.txt"
    first = journal.read_text(encoding="utf-8").partition("\n")[0] if journal.is_file() else ""
    run_id = own.run_id or first or secrets.token_hex(4)
    logger = WandbLogger(version=run_id, mode=wandb_mode(asked["offline"]), **options)
    try:
        _ = logger.experiment  # starts the run
    except Exception as error:  # W&B's errors have no common base
        _log.warning("W&B cannot be used online, so this run is kept offline: %s", error)
        run_id = secrets.token_hex(4)  # W&B considers the other id to be in use
        logger = WandbLogger(version=run_id, mode="offline", **options)
    if run_id != first:
        write_text(journal, f"{run_id}\n")
    return logger, journal


def _close(run: Any, *, exit_code: int) -> None:
    try:
        run.finish(exit_code=exit_code)
    except Exception as error:
        _log.warning("W&B did not take the end of the run: %s: %s", type(error).__name__, error)
    if (kept := Path(run.dir).parent).name.startswith("offline-run"):
        _log.info("W&B run kept offline; to upload it: wandb sync %s", kept)
