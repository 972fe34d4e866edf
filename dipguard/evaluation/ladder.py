"""The ladder: attacks that know more and more of a defence, each on each row, cell by cell.

    ladder/clean/<row>.npz    the clean images: which are read rightly, and what was found out about the system
    ladder/<rung>/<row>.npz   a finished cell: attacked images, which of them are read rightly, cost, course
    ladder/<rung>/<row>.json  a cell that failed, and why; it is tried again by the next run
    ladder.csv                a line a cell, with the worst case (evaluation/ladder_results.py)
    ladder_checks.csv         the masking checks (evaluation/masking.py)

Whatever the attack saw, a cell's figure is what the defence's own evaluation sees: its images are purified once more,
with the evaluation's draws.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dipguard.attacks import Cost
from dipguard.attacks.hopskipjump import HopSkipJump
from dipguard.data import ImageSet
from dipguard.evaluation.cells import CLEAN
from dipguard.evaluation.ladder_plan import Planned, Target, plan_ladder, targets_of
from dipguard.evaluation.ladder_results import FIELDS, clean_key, lines_of, load_cells, load_clean
from dipguard.evaluation.masking import check_target
from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.metrics import decide
from dipguard.evaluation.probes import Probe, probe
from dipguard.evaluation.results import csv_text
from dipguard.files import write_json, write_text

_log = logging.getLogger(__name__)

CHECK_FIELDS = ("row", "check", "verdict", "figures")


def estimate_ladder(matrix: Matrix) -> dict[str, Cost]:
    """What each rung will cost on each row, at most, by ``rung x row``; nothing is run.

    The looks by which the results are judged come on top: one purification an image and cell.

    Raises:
        TypeError, ValueError, ImportError: An attack's settings are out of range, or its library is missing.
    """
    return {f"{cell.rung} x {cell.target.label}": cell.cost for cell in plan_ladder(matrix) if cell.why is None}


def run_ladder(matrix: Matrix) -> list[str]:
    """Run what the folder does not hold yet; tables are written after each rung.

    A cell that fails is logged and noted down, and the others are run all the same.

    Returns:
        The cells that failed, ``rung x row: error``.
    """
    if not matrix.config.ladder:
        return []
    targets = targets_of(matrix)
    cells = plan_ladder(matrix, targets)
    failed = [f"{CLEAN} x {t.label}: {e}" for t in targets if t.row.unavailable is None and (e := _clean(matrix, t))]
    rung = None
    for cell in cells:
        if rung not in (None, cell.rung):
            write_ladder(matrix, cells)
        rung = cell.rung
        error = _attempt(matrix, cell)
        if error is not None:
            failed.append(f"{cell.rung} x {cell.target.label}: {error}")
    write_ladder(matrix, cells)
    return failed


def write_ladder(matrix: Matrix, plan: list[Planned] | None = None) -> None:
    """Write ladder.csv and ladder_checks.csv from what is stored; runs nothing."""
    if not matrix.config.ladder:
        return
    cells = load_cells(matrix, plan_ladder(matrix) if plan is None else plan)
    lines: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    for target in dict.fromkeys(cell.planned.target for cell in cells):
        mine = [cell for cell in cells if cell.planned.target is target]
        clean = load_clean(matrix, target)
        lines += lines_of(matrix, target, mine, clean)
        if any(cell.right is not None for cell in mine):
            found = check_target(mine, None if clean is None else Probe.of(clean))
            checks += [{"row": target.label, **check.to_dict()} for check in found]
    write_text(matrix.folder.path / "ladder.csv", csv_text(FIELDS, lines))
    write_text(matrix.folder.path / "ladder_checks.csv", csv_text(CHECK_FIELDS, checks))


def _attempt(matrix: Matrix, cell: Planned) -> str | None:
    """Run a cell unless it is stored or does not apply; the error where it failed."""
    path = _path(matrix, cell.rung, cell.target)
    if cell.attack is None or matrix.folder.load(path, key=cell.key) is not None:
        return None
    _log.info("%s x %s: %d images, at most %s", cell.rung, cell.target.label, cell.count, cell.cost)
    note = path.with_suffix(".json")
    try:
        arrays = _run(matrix, cell)
    except Exception as error:  # whatever it is, hours of other cells must not be lost to it
        _log.exception("%s x %s failed", cell.rung, cell.target.label)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        write_json(note, {"key": cell.key, "error": text})
        return text
    matrix.folder.save(path, arrays, key=cell.key)
    note.unlink(missing_ok=True)
    right = int(arrays["right"].sum())
    _log.info("%s x %s: %d of %d right, %.0f s", cell.rung, cell.target.label, right, cell.count, arrays["seconds"])
    return None


def _run(matrix: Matrix, cell: Planned) -> dict[str, Any]:
    attack, clean = cell.attack, matrix.clean.select(limit=cell.count)
    assert attack is not None
    before = getattr(attack, "spent", Cost())
    start = time.perf_counter()
    attacked = _attacked(attack, clean, cell, matrix.device)
    seconds = time.perf_counter() - start
    spent = getattr(attack, "spent", Cost())
    looks = [getattr(spent, name) - getattr(before, name) for name in Cost.__dataclass_fields__]
    return {
        "attacked": attacked.cpu().numpy(),
        "right": judge(cell.target, attacked, clean, chunk=matrix.config.chunk).numpy(),
        "seconds": np.float64(seconds),
        "spent": np.array(looks, dtype=np.int64),
        "history": np.array(getattr(attack, "history", []), dtype=np.float64),
        "last_history": np.array(getattr(attack, "last_history", []), dtype=np.float64),
        "flat": np.array([attack.flat] if hasattr(attack, "flat") else [], dtype=np.float64),
    }


def _attacked(attack: Any, clean: ImageSet, cell: Planned, device: torch.device) -> Tensor:
    images, labels = clean.images.to(device), clean.labels.to(device)
    if not isinstance(attack, HopSkipJump):
        attacked: Tensor = attack(images, labels, indices=clean.indices)
        return attacked
    curve = attack.curve(images, labels, budgets=(attack.queries,), indices=clean.indices)
    # What lies beyond eps is no answer to this threat: such an image counts as it was.
    near = curve.distances[attack.queries] <= cell.eps_255 / 255 + 1e-6
    return torch.where(near.view(-1, 1, 1, 1), curve.images[attack.queries], images)


def judge(target: Target, attacked: Tensor, clean: ImageSet, *, chunk: int) -> Tensor:
    """Whether each image is read rightly behind the defence, with its evaluation's draws: bool [N] on the CPU."""
    parts = zip(attacked.split(chunk), clean.indices.split(chunk), strict=True)
    read = [decide(target.victim, target.row.purify(images, indices=indices)) for images, indices in parts]
    return torch.cat(read) == clean.labels


def _clean(matrix: Matrix, target: Target) -> str | None:
    path, key = _path(matrix, CLEAN, target), clean_key(target)
    if matrix.folder.load(path, key=key) is not None:
        return None
    _log.info("clean images x %s", target.label)
    try:
        start = time.perf_counter()
        right = judge(target, matrix.clean.images.to(matrix.device), matrix.clean, chunk=matrix.config.chunk).numpy()
        seconds = np.float64(time.perf_counter() - start)
        found = probe(target, matrix.clean.select(limit=1), matrix.device)
    except Exception as error:
        _log.exception("clean images x %s failed", target.label)
        return f"{type(error).__name__}: {error}"
    matrix.folder.save(path, {"right": right, "seconds": seconds, **found.arrays()}, key=key)
    return None


def _path(matrix: Matrix, rung: str, target: Target) -> Path:
    return matrix.folder.path / "ladder" / rung / f"{target.label}.npz"
