"""The log of a run, written to a logger of Lightning as the run goes; the results are the run folder's own files."""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.image import imread
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from dipguard.config import LOGGERS, RunConfig, name_of
from dipguard.decision import DecisionTrace
from dipguard.defenses.dip import DIPDefense
from dipguard.evaluation.cell import Cell
from dipguard.evaluation.matrix import Matrix, Row
from dipguard.evaluation.results import result_row
from dipguard.evaluation.sweep_job import objective, settings_of, swept
from dipguard.files import write_text
from dipguard.reporting.report import draw_cell
from dipguard.reporting.results import flatten
from dipguard.store import digest_of, numerics
from dipguard.version import __version__

_log = logging.getLogger(__name__)

NONE: Mapping[str, Path] = {}
CODE = Path(__file__).resolve().parents[2]
CELLS = "cells/done"
"""Number of finished cells: the axis of what is logged when a cell is finished."""
FIGURES = ("accuracy", "low", "high", "ssim", "psnr", "n", "seconds_per_image", "attack_seconds")
"""What is logged of a finished cell."""
MOST_TRACES, MOST_PIXELS = 64, 2**20
"""Most traces of a cell that its curve of accuracy is a mean over; pixels of a column of W&B's table, about."""
WANDB_SETTINGS: dict[str, Any] = {"init_timeout": 30.0, "finish_timeout": 120.0, "console": "off", "silent": True}
"""After these seconds without W&B's server, the run or the rest of it is kept offline. The terminal is not captured:
that would outlive the job in a process with several jobs."""


class RunLog:
    """The log of a matrix (:class:`dipguard.evaluation.runner.Log`): curves, finished cells, and at the end the images.

    Curves of a single cell are those of all its fits, one after the other. In a matrix of many, each cell is followed
    in its first stack, under ``fit/<defense>/<attack>/``.

    A row has a key, and is entered once. A run folder that is resumed with the same settings goes on with its W&B run,
    so that the keys of W&B's rows are kept in ``journal``, after the run's id and a digest of the settings in the first
    line. CSV and TensorBoard begin a new log, with all rows.
    """

    def __init__(self, matrix: Matrix, inner: Logger, journal: Path | None = None) -> None:
        self.matrix, self.inner, self.journal = matrix, inner, journal
        self.run: Any = inner.experiment if isinstance(inner, WandbLogger) else None
        self.keys = set() if journal is None else set(journal.read_text(encoding="utf-8").splitlines()[1:])
        self._earlier, self._single = len(self.keys), len(matrix.cells) == 1
        self._done: list[Cell] = []
        self._ends: dict[tuple[str, int], int] = {}  # the step after the last one of a chunk's curves
        self._summary: dict[str, Any] = {}

    def curves(self, cell: Cell, *, chunk: int) -> Row | None:
        """Where the curves of a chunk of this number go."""
        if chunk and not self._single:
            return None
        self.inner.save()
        longest = cell.defense.steps_per_purification
        # Stacks begin at multiples of the longest fit; how many a chunk has, free memory decides.
        stack = cell.defense.longest_fit if isinstance(cell.defense, DIPDefense) else 1
        first = -(-self._ends.get((cell.key, chunk - 1), 0) // stack) * stack

        def enter(step: int, metrics: Mapping[str, float]) -> None:
            self._ends[cell.key, chunk] = max(self._ends.get((cell.key, chunk), 0), first + step + 1)
            if self._single or step < longest:
                row = {self._name(cell, name): value for name, value in metrics.items()}
                self.add(" ".join([cell.key[:16], f"{chunk}:{step}", *sorted(row)]), row, step=first + step)

        return enter

    def finished(self, cell: Cell) -> None:
        """Enter a finished cell, with pictures of its first images if it has a DIP."""
        self._done.append(cell)
        for chunk, curve in enumerate(islice(self.matrix.curves(cell), None if self._single else 1)):
            if (row := self.curves(cell, chunk=chunk)) is not None:
                for step, metrics in curve:
                    row(step, metrics)
        result, (attack, defense) = self.matrix.results[cell.place][-1], cell.place
        found = result_row(self.matrix, result)
        figures = {name: found[name] for name in FIGURES if found[name] is not None}
        alike = [done for done in self._done if done.target is cell.target and not done.check]
        rights = [float(self.matrix.results[done.place][-1].right.double().mean()) for done in alike]
        mean = {"mean_accuracy": sum(rights) / len(rights)} if rights else {}
        of_cell = flatten({attack: figures, **mean}, f"result/{defense}/", sep="/")
        self._summary |= of_cell
        key = " ".join([cell.key, *cell.place])  # two attacks that are the same have one `cell.key`
        if key in self.keys:
            return
        for step, right in self._accuracy_of_fits(cell):
            name = self._name(cell, "fit/accuracy")
            self.add(f"{cell.key[:16]} {step} {name}", {name: right}, step=step)
        place, number = f"_{defense}.{attack}", len(self._done)
        drawn = draw_cell(self.matrix, result, place) if cell.defense.steps_per_image and not self._single else []
        pictures = {f"figures/{defense}/{attack}/{path.stem.replace(place, '')}": path for path in drawn}
        own = flatten({**figures, "seconds": sum(result.seconds.values())}, "cells/")
        self.add(key, {CELLS: number, **own, **of_cell}, step=number, pictures=pictures)
        self.inner.save()

    def results(self, metrics: Mapping[str, Any], figures: Sequence[Path]) -> None:
        """Enter the run's own metrics and figures, the table of its images and, if they are wanted, its artifacts.

        The ``objective`` is what the programs return to a sweeper, so that all jobs of a sweep have it.
        """
        flat = {name: v for name, v in flatten(metrics, "result/", sep="/").items() if isinstance(v, int | float)}
        found = objective(self.matrix.folder, self.matrix.config.objective)
        flat |= {} if found is None else {"objective": found}
        key, images = digest_of(sorted(cell.key for cell in self._done)), pd.read_csv(self.matrix.folder / "images.csv")
        self.add(f"result {key}", flat, pictures={f"figures/{path.stem}": path for path in figures})
        if isinstance(self.inner, TensorBoardLogger):
            self.inner.experiment.add_text("images", images.to_markdown(index=False))
            if found is not None:  # beside the settings in the tab HPARAMS
                self.add(f"hp_metric {key}", {"hp_metric": found}, step=1)
        elif self.run is not None:
            import wandb

            with self._as_copy():
                table = images.astype(object).assign(**self._pictures())
                self.add(f"images {key}", {"images": wandb.Table(dataframe=table)})
                self.run.summary.update({**self._summary, **flat})  # a resumed offline run begins a new one
                if self.matrix.config.logger.get("artifacts") and self._claim(f"artifact {key}"):
                    self._upload(wandb.Artifact(f"reconstructions-{self.run.id}", type="reconstructions"))
                # Not config.yaml, since W&B writes one of its own.
                files = [self.matrix.folder / "results.csv", *self.matrix.folder.glob("*.log")]
                for file in [] if self.run.disabled else files:
                    copy = shutil.copy(file, self.run.dir)  # of a link W&B would warn
                    self.run.save(copy, base_path=self.run.dir, policy="now")

    def add(
        self, key: str, metrics: Mapping[str, Any], *, step: int | None = None, pictures: Mapping[str, Path] = NONE
    ) -> None:
        """Enter a row, unless one of this key is there. Pictures go to TensorBoard and W&B."""
        if key in self.keys:
            return
        if self.run is None:
            self.keys.add(key)
            if metrics:
                self.inner.log_metrics(dict(metrics), step=step)
            if isinstance(self.inner, TensorBoardLogger):
                for name, path in pictures.items():
                    self.inner.experiment.add_image(name, imread(path)[..., :3], step, dataformats="HWC")
            return
        import wandb

        with self._as_copy():
            row = {**metrics, **{name: wandb.Image(str(path)) for name, path in pictures.items()}}
            with _signals_held():
                self._claim(key)
                self._log(row, step)

    def _log(self, row: Mapping[str, Any], step: int | None) -> None:
        """Give a row to W&B."""
        if self._earlier and self.run.step < self._earlier:  # an offline record would count from 0 again
            self.run.log({}, step=self._earlier, commit=False)
        self._earlier = 0
        for name in row if CELLS in row else ():
            # Each by its name: W&B takes any one of the patterns that match, and Lightning has set "*".
            self.run.define_metric(name, step_metric=CELLS)
        self.inner.log_metrics(dict(row), step=None if CELLS in row else step)

    def _claim(self, key: str) -> bool:
        """Note a key; False if it was there already."""
        if key in self.keys:
            return False
        self.keys.add(key)
        if self.journal is not None:  # before the row: a killed run may lack a row, and has none twice
            with self.journal.open("a", encoding="utf-8") as file:
                file.write(f"{key}\n")
        return True

    @contextlib.contextmanager
    def _as_copy(self) -> Iterator[None]:
        """A failure of W&B does not end the run."""
        try:
            yield
        except Exception as error:
            _log.warning("W&B did not take all results: %s: %s", type(error).__name__, error)

    def _name(self, cell: Cell, name: str) -> str:
        return name if self._single else "/".join(["fit", *reversed(cell.place), name.removeprefix("fit/")])

    def _accuracy_of_fits(self, cell: Cell) -> Iterator[tuple[int, float]]:
        """At each sampled step, the share of x(t) that are classified correctly, from the traces that are kept."""
        right: dict[int, list[float]] = {}
        for i, path in islice(self.matrix.traces(cell), MOST_TRACES):
            trace = DecisionTrace.load(path)  # one at a time: they are large
            for step, decision in zip(trace.steps.tolist(), trace.decisions.tolist(), strict=True):
                right.setdefault(step, []).append(decision == int(cell.clean.labels[i]))
        yield from ((step, sum(values) / len(values)) for step, values in right.items())

    def _pictures(self) -> dict[str, list[Any]]:
        """Columns of pictures for images.csv: clean, given and reconstruction."""
        import wandb

        columns: dict[str, list[Any]] = {}
        budgets = [(n, r) for cells in self.matrix.results.values() for n, r in enumerate(cells) if r.done]
        wanted, (height, width) = self.matrix.config.figures, self.matrix.clean.images.shape[-2:]
        most = max(wanted, MOST_PIXELS // (height * width * max(1, len(budgets))))
        for budget, result in budgets if wanted else ():
            place, clean = result.cell.place, result.cell.clean.images
            made = self.matrix.reconstructions(*place, snapshot=budget)
            three = {"clean": clean, "given": self.matrix.attacked(*place, snapshot=budget), "reconstruction": made}
            for name, images in three.items():
                pixels = (images[:most] * 255).round().byte().permute(0, 2, 3, 1).numpy()
                columns.setdefault(name, []).extend([*map(wandb.Image, pixels), *[None] * (len(images) - len(pixels))])
        return columns

    def _upload(self, artifact: Any) -> None:
        """Give W&B all reconstructions, and the traces that are kept; their size is logged first."""
        for cell in self._done:
            with artifact.new_file(f"{'/'.join(['reconstructions', *cell.place])}.npz", mode="wb") as file:
                images = self.matrix.reconstructions(*cell.place).numpy()
                np.savez_compressed(file, images=images, indices=cell.clean.indices.numpy())
            for _, path in self.matrix.traces(cell):
                artifact.add_file(str(path), name=path.relative_to(self.matrix.folder).as_posix())
        count, size = len(artifact.manifest.entries), artifact.size / 1e6
        _log.info("W&B artifact %s: %d files, %.1f MB", artifact.name, count, size)
        self.run.log_artifact(artifact)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the end, so that a row and its key are entered together or not at all."""
    if threading.current_thread() is not threading.main_thread():  # signals do not reach it
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda got, _: came.append(got)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def open_log(matrix: Matrix, *, job_type: str = "fit", group: str | None = None) -> Iterator[RunLog | None]:
    """The run's log, closed at the end in any case; None if the config has ``logger.kind=none``.

    CSV files are in ``logs/csv/<session>/``, TensorBoard's in ``logs/tensorboard/<session>/``, W&B's in
    ``logs/wandb/``. ``job_type`` (``fit``, ``evaluate`` or ``sweep``) and ``group`` (the sweep) are for W&B.
    """
    config, folder, kind = matrix.config, matrix.folder, matrix.config.logger["kind"]
    if kind == "none":
        yield None
        return
    if kind == "wandb":
        inner, journal = _open_wandb(config, folder, job_type=job_type, group=group)
        log = RunLog(matrix, inner, None if inner.experiment.disabled else journal)
    else:
        root = folder / "logs" / kind
        session = f"session_{len(list(root.glob('session_*')))}"
        log = RunLog(matrix, (CSVLogger if kind == "csv" else TensorBoardLogger)(root, name="", version=session))
    status = "failed"
    try:
        log.inner.log_hyperparams(flat_settings(config))
        if log.run is not None and not (log.run.offline or log.run.disabled):
            _log.info("W&B run: %s", log.run.url)
        yield log
        status = "success"
    finally:
        log.inner.save()
        log.inner.finalize(status)
        if log.run is not None:
            with log._as_copy():
                log.run.finish(exit_code=int(status == "failed"))
            kept = Path(log.run.dir).parent
            if group is None and kept.name.startswith("offline-run"):  # a sweep's summary has one line for all
                # All records of the run: one that was resumed has several.
                _log.info("W&B run kept offline; to upload it: wandb sync %s", kept.parent / "offline-run-*")


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Settings as ``defense/tau`` if there is one defence, else ``defenses/paper/tau``: W&B's plots find no dots."""
    values = {name: value for name, value in config.to_dict().items() if name != "logger"}
    for many, one in (("attacks", "attack"), ("defenses", "defense")):
        if len(values[many]) == 1:
            (values[one],) = values.pop(many).values()
    return {"version": __version__, "code": code_state(), **flatten(values, sep="/")}


def repository() -> Path | None:
    """The code's own repository; None for an installed package, which may lie in a repository of the user's."""
    return CODE if (CODE / ".git").exists() else None


def code_state() -> str | None:
    """The commit of the code, followed by ``-dirty`` if files differ from it; None outside of its own repository."""
    if repository() is None:
        return None
    command = ["git", "-C", str(CODE), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run_name(config: RunConfig, folder: Path, *, group: str | None) -> str:
    """A readable name: a sweep's job by what it differs in, other runs by data, victim, attacks and defences."""
    if group is not None:
        return swept(folder) or re.sub(r"-[0-9a-f]{8}$", "", folder.name)
    many = [("attacks", list(config.attacks)), ("defences", list(config.defenses))]
    what = [labels[0] if len(labels) == 1 else f"{len(labels)} {kind}" for kind, labels in many]
    between = "-" if all(len(labels) == 1 for _, labels in many) else " x "
    victim = str(config.victim.get("arch") or name_of(config.victim))
    return "-".join([name_of(config.data), victim, between.join(what)])


def wandb_mode(offline: bool | None) -> str:
    """The mode that was asked for, else that of W&B's own settings; but offline if there is no key for online."""
    import wandb
    from requests.utils import get_netrc_auth

    own = wandb.setup().settings
    key = own.api_key or get_netrc_auth(own.base_url)
    return {True: "offline", False: "online", None: own.mode if key or own.mode != "online" else "offline"}[offline]


def _open_wandb(config: RunConfig, folder: Path, *, job_type: str, group: str | None) -> tuple[WandbLogger, Path]:
    """Lightning's logger with its run, and its journal; offline if the server cannot be reached or refuses the key.

    What the config leaves open is as W&B's own settings say (``WANDB_NAME``, ``WANDB_PROJECT``, ...).
    """
    import wandb

    own, asked = wandb.setup().settings, dict.fromkeys(LOGGERS["wandb"]) | config.logger
    known = wandb.Settings.model_fields  # older versions do not know all settings
    # W&B looks for a repository around the folder of its files, which may be anywhere.
    root = own.git_root or repository()
    settings = {**WANDB_SETTINGS, **({"git_root": str(root)} if root else {"disable_git": True})}
    options: dict[str, Any] = {
        **{name: asked[name] for name in ("entity", "tags", "notes")},
        "save_dir": folder / "logs",
        # Under an agent of W&B, which chooses the settings, W&B's own numbered name.
        "name": asked["name"] or own.run_name or (None if own.sweep_id else run_name(config, folder, group=group)),
        "project": asked["project"] or own.project or "dipguard",
        "group": asked["group"] or own.run_group or group,
        "job_type": own.run_job_type or job_type,
        "reinit": "create_new",  # the run of the next job in this process is another one
        "settings": wandb.Settings(**{name: value for name, value in settings.items() if name in known}),
    }
    journal = folder / "logs" / "wandb_run.txt"
    first, _, rows = (journal.read_text(encoding="utf-8") if journal.is_file() else "").partition("\n")
    before, _, settings_before = first.partition(" ")
    # With other settings, versions or another project it is another run.
    now = digest_of([settings_of(config), numerics(), options["project"], options["entity"] or own.entity])
    # Jobs of a multirun cannot share the one id of the environment; W&B's agent starts one job for each of its ids.
    given = own.run_id if group is None or own.sweep_id else ""
    run_id = given or (before if settings_before == now else "") or secrets.token_hex(4)
    mode = wandb_mode(asked["offline"])
    if group is None and mode == "offline" and not asked["offline"] and own.mode == "online":
        _log.info("no W&B API key was found (run `wandb login`), so this run is kept offline")
    logger = WandbLogger(version=run_id, mode=mode, **options)
    try:
        _ = logger.experiment  # starts the run
    except Exception as error:  # W&B's errors have no common base
        _log.warning("W&B cannot be used online, so this run is kept offline: %s", error)
        run_id = secrets.token_hex(4)  # W&B considers the other id to be in use
        logger = WandbLogger(version=run_id, mode="offline", **options)
    if f"{run_id} {now}" != first:
        write_text(journal, f"{run_id} {now}\n{rows if run_id == before else ''}")
    return logger, journal
