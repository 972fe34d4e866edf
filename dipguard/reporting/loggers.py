"""One log for a whole run: the curves of its fits, then its results. It is a copy; the run folder's files count."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.image import imread
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from dipguard.files import write_text
from dipguard.reporting.results import flatten

_log = logging.getLogger(__name__)

MOST_FIGURES = 16
"""Most figures that a log is given; all of them are in the run folder."""
WANDB_SETTINGS: dict[str, Any] = {"init_timeout": 30.0, "finish_timeout": 120.0, "console": "off", "silent": True}
"""After these seconds without W&B's server, the run or the rest of it is kept offline. The terminal is not captured:
that would outlive the job in a process with several jobs."""


class RunLog(Logger):
    """A Lightning logger that collects all stacks of a run: many short Trainers write into ``inner``.

    ``first_step`` is added to the Trainer's step numbers.
    """

    def __init__(self, inner: Logger, *, first_step: int = 0) -> None:
        super().__init__()
        self.inner, self.first_step = inner, first_step

    name = property(lambda self: self.inner.name)
    version = property(lambda self: self.inner.version)

    def starting_at(self, first_step: int) -> RunLog:
        """The same log, for a fit whose step 0 is the run's ``first_step``."""
        return RunLog(self.inner, first_step=first_step)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write one line of metrics. A failure of W&B does not end the run."""
        try:
            self.inner.log_metrics(dict(metrics), step=None if step is None else self.first_step + step)
        except Exception as error:
            if not isinstance(self.inner, WandbLogger):
                raise
            _log.warning("W&B was not given some results: %s: %s", type(error).__name__, error)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `open_log` enters the run's settings once, instead of those of each stack's Trainer."""

    def finalize(self, status: str) -> None:
        """Write out what is buffered; `open_log` closes the inner logger at the end of the run."""
        self.inner.save()

    def log_results(self, metrics: Mapping[str, Any], images: pd.DataFrame, figures: Sequence[Path]) -> None:
        """Enter the final metrics and, into TensorBoard and W&B, the table of images and ``MOST_FIGURES`` figures."""
        final = flatten({f"result/{name}": value for name, value in metrics.items() if name != "settings"})
        self.log_metrics({name: value for name, value in final.items() if isinstance(value, int | float)})
        figures = figures[:MOST_FIGURES]
        if isinstance(self.inner, WandbLogger):
            import wandb

            pictures = {f"figures/{path.stem}": wandb.Image(str(path)) for path in figures}
            self.log_metrics({"images": wandb.Table(dataframe=images), **pictures})
        elif isinstance(self.inner, TensorBoardLogger):
            writer: Any = self.inner.experiment
            writer.add_text("images", images.to_markdown(index=False))
            for path in figures:
                writer.add_image(f"figures/{path.stem}", imread(path)[..., :3], dataformats="HWC")


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
        config: ``name`` and the options of that logger (:data:`dipguard.config.LOGGERS`).
        folder: The run folder.
        settings: Entered once, with dotted keys.
        job_type: For W&B: ``fit``, ``evaluate`` or ``sweep``.
        group: For W&B: the sweep, unless the config has a ``group``.
    """
    name = config["name"]
    if name == "none":
        yield None
        return
    inner: Logger
    if name == "wandb":
        inner = _open_wandb(config, folder, group=config.get("group") or group, job_type=job_type)
    else:
        root = folder / "logs" / name
        session = f"session_{len(list(root.glob('session_*')))}"
        inner = (CSVLogger if name == "csv" else TensorBoardLogger)(root, name="", version=session)
    status = "failed"
    try:
        inner.log_hyperparams(flatten(settings))
        yield RunLog(inner)
        status = "success"
    finally:
        inner.save()
        inner.finalize(status)
        if isinstance(inner, WandbLogger):
            _close(inner.experiment, exit_code=int(status == "failed"))


def wandb_mode(offline: bool | None) -> str:
    """The mode that was asked for, else that of W&B's own settings; but offline if there is no key for online."""
    import wandb
    from requests.utils import get_netrc_auth

    own = wandb.setup().settings
    key = own.api_key or get_netrc_auth(own.base_url)
    return {True: "offline", False: "online", None: own.mode if key or own.mode != "online" else "offline"}[offline]


def _open_wandb(config: Mapping[str, Any], folder: Path, **options: Any) -> WandbLogger:
    """Lightning's logger with its run; offline if the server cannot be reached or refuses the key."""
    import wandb

    known = wandb.Settings.model_fields  # older versions do not know all settings
    options |= {
        "save_dir": folder / "logs",
        "name": folder.name,
        "project": config.get("project"),
        "entity": config.get("entity"),
        "reinit": "create_new",  # the run of the next job in this process is another one
        "settings": wandb.Settings(**{name: value for name, value in WANDB_SETTINGS.items() if name in known}),
    }
    path = folder / "logs" / "wandb_id.txt"
    if not path.is_file():
        write_text(path, secrets.token_hex(4))
    logger = WandbLogger(version=path.read_text().strip(), mode=wandb_mode(config.get("offline")), **options)
    try:
        _ = logger.experiment  # starts the run
    except Exception as error:  # W&B's errors have no common base
        _log.warning("W&B cannot be used online, so this run is kept offline: %s", error)
        # W&B considers the other id to be in use.
        logger = WandbLogger(version=secrets.token_hex(4), mode="offline", **options)
    return logger


def _close(run: Any, *, exit_code: int) -> None:
    try:
        run.finish(exit_code=exit_code)
    except Exception as error:
        _log.warning("W&B did not take the end of the run: %s: %s", type(error).__name__, error)
    if (kept := Path(run.dir).parent).name.startswith("offline-run"):
        _log.info("W&B run kept offline; to upload it: wandb sync %s", kept)
