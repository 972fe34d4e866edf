"""Runs the cells of a matrix: one after the other in one process, or their chunks shared out to several."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from itertools import islice, product
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from torch.utils.data import DataLoader
from tqdm import tqdm

from dipguard.attacks import Cost
from dipguard.evaluation.cell import CLEAN, Cell
from dipguard.evaluation.matrix import Matrix, parts_of
from dipguard.evaluation.plan import prepare
from dipguard.evaluation.randomness import Randomness
from dipguard.evaluation.results import append_images, write_results, write_table
from dipguard.fit import FitProgress
from dipguard.store import Entry

_log = logging.getLogger(__name__)

IMAGE = 25
"""Steps of a fit that take about as long as an attack on one image, or a feed-forward defence of one."""


class RunLogger(Protocol):
    """The log of a run, into which many short fits write."""

    def starting_at(self, first_step: int) -> Logger:
        """A Lightning logger for a fit whose step 0 is the run's ``first_step``."""
        ...


def run(matrix: Matrix, *, log: RunLogger | None = None) -> list[str]:
    """Attack, purify and evaluate what is not stored yet. The tables are brought up to date after each cell.

    A cell that fails is logged and noted, and the others are run all the same; a matrix of one cell raises its error.

    Args:
        matrix: See :func:`~dipguard.evaluation.prepare`.
        log: Log of the run; the curves of the fits go there if the matrix has one cell.

    Returns:
        The cells that failed, ``attack x defence: error``.
    """
    write_results(matrix)
    todo = [cell for cell in matrix.cells if cell.why is None and not matrix.results[cell.place][0].done]
    _announce(matrix, todo)
    if matrix.config.processes > 1 and todo:
        _share_out(matrix, todo)
    single, before = len(matrix.cells) == 1, Counter(matrix.store.counts)
    failed: list[str] = []
    broken: dict[str, str] = {}
    units = {cell.place: _units(cell) for cell in todo}
    total, reached, show = sum(units.values()), 0, bool(matrix.config.trainer.get("enable_progress_bar", True))
    with tqdm(total=total, desc="evaluate", unit_scale=True, disable=not show, dynamic_ncols=True) as bar:
        for cell in todo:
            name = f"{cell.label} x {cell.target.label}"
            bar.set_postfix_str(name)
            error = broken.get(cell.attack_key)
            try:
                if error is None:
                    _run_cell(matrix, cell, FitProgress(bar), log if single else None)
            except Exception as problem:
                if single:
                    raise
                # Whatever it is, hours of other cells must not be lost to it.
                _log.exception("%s failed", name)
                error = " ".join(f"{type(problem).__name__}: {problem}".split())
                if not matrix.has_attacked(cell):
                    broken[cell.attack_key] = error  # other defences would meet the same
            if error is not None:
                matrix.fail(cell, error)
                failed.append(f"{name}: {error}")
            append_images(matrix, cell)
            write_table(matrix)
            reached += units[cell.place]
            bar.total = total  # fits take off what they were spared
            bar.update(reached - bar.n)
    failed += _check_randomness(matrix)
    write_results(matrix)  # in the order of the matrix
    counts = matrix.store.counts - before
    _log.info("store: %s", ", ".join(f"{name} {count}" for name, count in counts.items()) or "nothing was needed")
    return failed


def _run_cell(matrix: Matrix, cell: Cell, progress: FitProgress, log: RunLogger | None) -> None:
    # Steps that the fits of a chunk take in the log, one stack after the other.
    stack = getattr(cell.defense, "stack_size", None) or matrix.chunk_size
    steps = -(-matrix.chunk_size // stack) * cell.defense.steps_per_image
    chunks: list[list[Entry]] = []
    for snapshot in range(len(matrix.attack_entry(cell).header["snapshots"])):
        chunks.append([])
        for number, part in enumerate(parts_of(len(cell.clean), matrix.chunk_size)):
            logger = None if log is None else log.starting_at(number * steps)
            chunks[-1].append(matrix.chunk(cell, snapshot, part, callbacks=[progress], logger=logger))
    matrix.finish(cell, chunks)
    right = matrix.results[cell.place][-1].right
    _log.info("%s x %s: %d of %d right", *cell.place, int(right.sum()), len(right))


def _units(cell: Cell) -> int:
    """About how long a cell takes, in steps of one image's fit."""
    snapshots = len(cell.options.get("budgets") or [0]) * len(cell.options.get("radii_255") or [0])
    looks = cell.cost.purifications + len(cell.clean) * (1 + snapshots)
    return looks * IMAGE + cell.cost.dip_steps + snapshots * len(cell.clean) * cell.defense.steps_per_image


def _check_randomness(matrix: Matrix) -> list[str]:
    """Find out, for an attack suite, whether the defences draw and optimise; the checks that failed."""
    failed = []
    for cell in matrix.cells:
        if cell.suite and cell.label == CLEAN and cell.why is None:
            try:
                Randomness.find(matrix, cell.target)
            except Exception as problem:
                _log.exception("the randomness check of %s failed", cell.target.label)
                failed.append(f"randomness check x {cell.target.label}: {type(problem).__name__}: {problem}")
    return failed


def _announce(matrix: Matrix, todo: Sequence[Cell]) -> None:
    """Say what will be run, and what it costs at most."""
    steps = sum(cell.defense.steps_per_image * len(cell.clean) for cell in todo)
    _log.info(
        "%d attacks x %d defences = %d cells, %d to be run, %s DIP steps beside those of adaptive attacks",
        len(matrix.attacks), len(matrix.targets), len(matrix.cells), len(todo), f"{steps:,}",
    )  # fmt: skip
    for label, defense in matrix.defenses.items():
        if defense.unavailable is not None:
            _log.warning("defence %s: %s", label, defense.unavailable)
    costs = {cell.place: cell.cost for cell in todo if cell.adaptive}
    for place, cost in costs.items():
        _log.info("%s x %s will cost at most %s", *place, cost)
    if costs:
        _log.info("together at most %s", sum(costs.values(), Cost()))


class _Share(pl.LightningModule):
    """Purifies one process's share of the chunks; made from the settings, since not every defence can be pickled."""

    def __init__(self, matrix: Matrix, places: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self.settings, self.path, self.places = matrix.config, matrix.folder, list(places)

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Every n-th chunk of n processes, starting at this one's rank."""
        with torch.inference_mode(False):
            matrix = prepare(self.settings, self.path)
            for cell in (matrix.cell(*place) for place in self.places):
                snapshots = range(len(matrix.attack_entry(cell).header["snapshots"]))
                chunks = product(snapshots, parts_of(len(cell.clean), matrix.chunk_size))
                for snapshot, part in islice(chunks, self.global_rank, None, self.trainer.world_size):
                    matrix.chunk(cell, snapshot, part)


def _share_out(matrix: Matrix, todo: Sequence[Cell]) -> None:
    """Purify the chunks of static attacks in several processes through Lightning's own DDP.

    Chunks are entries of the store, so nothing travels between the processes. A chunk's result does not depend on the
    process that made it. Adaptive attacks are left to the caller.
    """
    shared = [cell for cell in todo if not cell.adaptive]
    for cell in shared:  # once, before they are shared out
        matrix.attack_entry(cell)
    trainer = pl.Trainer(
        accelerator="gpu" if matrix.device.type == "cuda" else "cpu",
        devices=matrix.config.processes,
        strategy="ddp_spawn",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    ranks: DataLoader[int] = DataLoader(range(matrix.config.processes), batch_size=1)  # type: ignore[arg-type]
    trainer.predict(_Share(matrix, [cell.place for cell in shared]), ranks, return_predictions=False)
