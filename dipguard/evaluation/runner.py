"""Runs the cells of a matrix: one after the other in one process, or their chunks shared out to several."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from dipguard.attacks import Cost
from dipguard.config import RunConfig
from dipguard.evaluation.cell import CLEAN, Cell, CellResult
from dipguard.evaluation.masking import randomness_of
from dipguard.evaluation.matrix import Matrix, Row, parts_of
from dipguard.evaluation.plan import prepare
from dipguard.evaluation.results import write_results
from dipguard.fit import FitProgress
from dipguard.store import Entry

_log = logging.getLogger(__name__)

IMAGE = 25
"""Steps of a fit that take about as long as an attack on one image, or a feed-forward defence of one."""


class Log(Protocol):
    """What is told about a run while it works."""

    def curves(self, cell: Cell, *, chunk: int) -> Row | None:
        """Where the curves of a cell's chunk of this number go; None: they are not wanted."""

    def finished(self, cell: Cell) -> None:
        """A cell is finished, now or by an earlier run."""


def run(matrix: Matrix, *, log: Log | None = None) -> list[str]:
    """Attack, purify and evaluate what is not stored yet. results.csv is brought up to date after each cell.

    A cell that fails is logged and noted, and the others are run all the same; a matrix of one cell raises its error.
    ``log`` is told of each finished cell at once. Returns the cells that failed, in words.
    """
    write_results(matrix)
    todo = [cell for cell in matrix.cells if cell.why is None and not matrix.results[cell.place][0].done]
    order = list(dict.fromkeys(cell.label for cell in todo))
    # First the defence that an attack's images are made on: the attack is a part of its cost.
    todo.sort(key=lambda cell: (order.index(cell.label), cell.source is not cell.target))
    _announce(matrix, todo)
    for cell in matrix.cells:
        _tell(log, matrix, cell)
    if matrix.config.processes > 1 and any(not cell.adaptive for cell in todo):
        _share_out(matrix, todo)
    single, before = len(matrix.cells) == 1, Counter(matrix.store.counts)
    failed: list[str] = []
    units = {cell.place: _units(matrix, cell) for cell in todo}
    total, reached, show = sum(units.values()), 0, bool(matrix.config.trainer.get("enable_progress_bar", True))
    with tqdm(total=total, desc="evaluate", unit_scale=True, disable=not show, dynamic_ncols=True) as bar:
        for cell in todo:
            name = f"{cell.label} x {cell.target.label}"
            bar.set_postfix_str(name)
            try:
                _run_cell(matrix, cell, FitProgress(bar), log)
            except Exception as problem:
                if single:
                    raise
                # Whatever it is, hours of other cells must not be lost to it.
                _log.exception("%s failed", name)
                error = " ".join(f"{type(problem).__name__}: {problem}".split())
                matrix.results[cell.place] = [CellResult(cell, f"failed: {error}", cell.eps_255)]
                failed.append(f"{name}: {error}")
            _copy(partial(write_results, matrix, images=False), "results.csv was not brought up to date")
            _tell(log, matrix, cell)
            reached += units[cell.place]
            bar.total = total  # fits take off what they were spared
            bar.update(reached - bar.n)
    failed += _check_randomness(matrix)
    write_results(matrix)
    counts = matrix.store.counts - before
    _log.info("store: %s", ", ".join(f"{name} {count}" for name, count in counts.items()) or "nothing was needed")
    return failed


def _tell(log: Log | None, matrix: Matrix, cell: Cell) -> None:
    """Tell the log of a cell, if it is finished."""
    if log is not None and matrix.results[cell.place][0].done:
        _copy(partial(log.finished, cell), f"{cell.label} x {cell.target.label} was not logged")


def _copy(write: Callable[[], object], problem: str) -> None:
    """Write what is only a copy of finished work: the other cells must not be lost if that fails."""
    try:
        write()
    except Exception:
        _log.exception(problem)


def _run_cell(matrix: Matrix, cell: Cell, progress: FitProgress, log: Log | None) -> None:
    def looked(images: int) -> None:
        progress.bar.update(images * (IMAGE + cell.source.bare.steps_per_image))

    chunks: list[list[Entry]] = []
    snapshots = len(matrix.attack_entry(cell, tell=looked).header["snapshots"])
    for snapshot in range(snapshots):
        chunks.append([])
        for number, part in enumerate(parts_of(len(cell.clean), matrix.chunk_size)):
            row = log.curves(cell, chunk=number) if log is not None and snapshot == snapshots - 1 else None
            chunks[-1].append(matrix.chunk(cell, snapshot, part, progress=progress, row=row))
    matrix.finish(cell, chunks, progress=progress)
    right = matrix.results[cell.place][-1].right
    _log.info("%s x %s: %g of %d right", *cell.place, right.sum(), len(right))


def _units(matrix: Matrix, cell: Cell) -> int:
    """About how long what is not stored of a cell takes, in steps of one image's fit."""
    looks = cell.cost.purifications + len(cell.clean) * (1 + cell.budgets)
    return looks * IMAGE + cell.cost.dip_steps + _left(matrix, cell) * cell.defense.steps_per_image


def _left(matrix: Matrix, cell: Cell) -> int:
    """Purifications of a cell's images that are not stored."""
    draws = [("chunk",), *(("draw", number) for number in range(1, cell.judge))]
    chunks = product(draws, range(cell.budgets), parts_of(len(cell.clean), matrix.chunk_size))
    keys = {cell.sub_key(*draw, n, part.start, part.stop): part.stop - part.start for draw, n, part in chunks}
    return sum(count for key, count in keys.items() if not matrix.store.file("cells", key).is_file())


def _check_randomness(matrix: Matrix) -> list[str]:
    """Find out, for an attack suite, whether the defences draw and optimise; the checks that failed."""
    failed = []
    for cell in matrix.cells:
        if cell.suite and cell.label == CLEAN and cell.why is None:
            try:
                randomness_of(matrix, cell.target, find=True)
            except Exception as problem:
                _log.exception("the randomness check of %s failed", cell.target.label)
                failed.append(f"randomness check x {cell.target.label}: {type(problem).__name__}: {problem}")
    return failed


def _announce(matrix: Matrix, todo: Sequence[Cell]) -> None:
    """Say what will be run, and what it costs at most."""
    # Attacks that are the same are made, and judged, once.
    steps = sum({cell.key: cell.judging.dip_steps * cell.budgets for cell in todo}.values())
    _log.info(
        "%d attacks x %d defences = %d cells; %d are still to run, with %s DIP steps to defend and judge their images; "
        "adaptive attacks cost more",
        len(matrix.cells) // len(matrix.targets), len(matrix.targets), len(matrix.cells), len(todo), f"{steps:,}",
    )  # fmt: skip
    for label, target in matrix.targets.items():
        if target.defense.unavailable is not None:
            _log.warning("defence %s: %s", label, target.defense.unavailable)
    adaptive = [cell for cell in todo if cell.adaptive]
    for cell in adaptive:
        _log.info("%s x %s will cost at most %s", *cell.place, cell.cost)
    if adaptive:
        _log.info("together at most %s", sum({cell.key: cell.cost for cell in adaptive}.values(), Cost()))


def _share_out(matrix: Matrix, todo: Sequence[Cell]) -> None:
    """Purify the chunks of static attacks in several processes; what they leave is left to the caller.

    Chunks are entries of the store, so nothing travels between the processes.
    """
    shared: list[Cell] = []
    for cell in (cell for cell in todo if not cell.adaptive):
        with suppress(Exception):  # the caller will meet it too, and note it
            matrix.attack_entry(cell)  # once, before they are shared out
            shared.append(cell)
    if not shared:
        return
    count, given = matrix.config.processes, (matrix.config, matrix.folder, [cell.place for cell in shared])
    make = get_context("spawn").Process  # in a forked process a fit would hang
    workers = [make(target=_work, args=(rank, count, *given), daemon=True) for rank in range(count)]
    for worker in workers:
        worker.start()
    total, show = sum(_left(matrix, cell) for cell in shared), matrix.config.trainer.get("enable_progress_bar", True)
    with tqdm(total=total, desc=f"{count} processes", unit="image", disable=not show, dynamic_ncols=True) as bar:
        while running := [worker.sentinel for worker in workers if worker.is_alive()]:
            connection.wait(running, timeout=2)
            bar.update(total - sum(_left(matrix, cell) for cell in shared) - bar.n)


def _work(rank: int, count: int, config: RunConfig, folder: Path, places: Sequence[tuple[str, str]]) -> None:
    """Purify every ``count``-th chunk of the cells at ``places``, from ``rank`` on, for each draw that judges it.

    What fails is left to the parent, which meets it too. With the torch engine, another number of threads may change a
    fit's numbers by rounding.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    if config.trainer.get("accelerator") != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    matrix = prepare(config, folder)  # made anew, since not every defence can be pickled
    turn = itertools.count()  # through all cells: small ones have fewer chunks than there are processes
    for cell in (matrix.cell(*place) for place in places):
        snapshots = range(len(matrix.attack_entry(cell).header["snapshots"]))
        for snapshot, draw, part in product(snapshots, range(cell.judge), parts_of(len(cell.clean), matrix.chunk_size)):
            if next(turn) % count != rank:
                continue
            with suppress(Exception):
                matrix.draw(cell, snapshot, part, draw) if draw else matrix.chunk(cell, snapshot, part)


def _end_with_parent() -> None:
    """End this process when its parent ends, even if that is killed."""
    parent = parent_process()
    connection.wait([] if parent is None else [parent.sentinel])
    os._exit(1)
