"""Results as files: results.csv (all cells), images.csv (all images of all cells), checks.csv (the suite's checks)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from dipguard.evaluation.cell import CLEAN, DONE, FIGURES, NOT_RUN, WORST, CellResult, Target, name_of
from dipguard.evaluation.masking import masking_checks
from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.metrics import wilson
from dipguard.evaluation.randomness import Randomness
from dipguard.files import csv_text, write_text

FIELDS = (
    "data", "victim", "surrogate", "attack", "attack_name", "number", "check", "eps_255", "budget", "defense",
    "defense_name", "seed", "n", "correct", "accuracy", "low", "high", "ssim", "psnr", "seconds_per_image",
    "purifications", "dip_steps", "victim_queries", "gradients", "attack_seconds", "status", "options", "cut", "note",
    "key",
)  # fmt: skip
"""Columns of results.csv: a row for each cell and, for attacks with several budgets, for each of them."""
IMAGE_FIELDS = (
    "attack", "defense", "eps_255", "budget", "index", "label", "decision_clean", "decision_given",
    "decision_defended", "ssim_given", "ssim", "psnr", "used", "why",
)  # fmt: skip
CHECK_FIELDS = ("defense", "check", "verdict", "figures")


def write_results(matrix: Matrix, *, images: bool = True) -> None:
    """Write all tables from what is stored, or all but images.csv; nothing is run."""
    matrix.load()
    rows = [result_row(matrix, result) for cell in matrix.cells for result in matrix.results[cell.place]]
    tables: dict[str, tuple[Sequence[str], list[dict[str, Any]]]] = {"results.csv": (FIELDS, rows)}
    if any(cell.suite for cell in matrix.cells):
        rows += [_worst_row(matrix, target) for target in matrix.targets.values()]
        checks = [row for target in matrix.targets.values() for row in _checks(matrix, target)]
        tables["checks.csv"] = CHECK_FIELDS, checks
    if images:
        lines = [line for cell in matrix.cells for line in _image_rows(matrix.results[cell.place])]
        tables["images.csv"] = IMAGE_FIELDS, lines
    for name, (fields, lines) in tables.items():
        write_text(matrix.folder / name, csv_text(fields, lines))


def suite_results(matrix: Matrix, target: Target) -> list[CellResult]:
    """The results of the suite's attacks on a target, without clean images; with several budgets, the last one."""
    cells = [cell for cell in matrix.cells if cell.target is target and cell.suite and cell.label != CLEAN]
    return [matrix.results[cell.place][-1] for cell in cells]


def worst_case(results: Iterable[CellResult], count: int, clean: Tensor | None = None) -> Tensor | None:
    """Whether each of ``count`` images is classified correctly under every attack, bool [count]; None without one.

    An attack on fewer images counts for those alone. Checks do not count. Not to attack is within every budget, so an
    image that is misclassified without an attack (``clean``, bool [count]) does not withstand.
    """
    attacks = [result.right for result in results if result.attacks]
    if not attacks:
        return None
    right = torch.ones(count, dtype=torch.bool) if clean is None else clean.clone()
    for one in attacks:
        right[: len(one)] &= one
    return right


def _checks(matrix: Matrix, target: Target) -> list[dict[str, Any]]:
    found = suite_results(matrix, target)
    checks = masking_checks(found, Randomness.read(matrix, target)) if any(result.done for result in found) else []
    return [{"defense": target.label, **asdict(check)} for check in checks]


def _image_rows(results: Iterable[CellResult]) -> Iterator[dict[str, Any]]:
    for result in results:
        cell = result.cell
        first = {"attack": cell.label, "defense": cell.target.label, "eps_255": result.eps_255, "budget": result.budget}
        columns = [cell.clean.indices, cell.clean.labels, cell.target.decisions_clean]
        columns += [getattr(result, name) for name in FIGURES]
        for *values, why in zip(*(column.tolist() for column in columns), result.reasons, strict=False):
            yield {**first, **dict(zip(IMAGE_FIELDS[4:-1], map(_short, values), strict=True)), "why": why}


def result_row(matrix: Matrix, result: CellResult) -> dict[str, Any]:
    """A row of results.csv."""
    cell = result.cell
    row = {
        **_of_target(matrix, cell.target),
        "attack": cell.label,
        "attack_name": cell.name,
        "number": cell.node.get("number") or "",
        "check": cell.check,
        "eps_255": result.eps_255,
        "budget": result.budget,
        "status": result.status,
        "options": cell.options_text,
        "cut": cell.cut,
        "note": cell.node.get("note") or "",
        "key": cell.key,
    }
    if not result.done:
        return row
    # An image that comes back unchanged has an infinite PSNR: the mean is over the others.
    finite = result.psnr[result.psnr.isfinite()]
    spent = sum(value for name, value in result.seconds.items() if name != "attack")
    return {
        **row,
        **_share(result.right),
        "ssim": _short(float(result.ssim.double().mean())),
        "psnr": _short(float(finite.mean())),
        "seconds_per_image": _short(spent / len(result.right)),
        "attack_seconds": _short(result.seconds["attack"]),
        **asdict(result.spent),
    }


def _worst_row(matrix: Matrix, target: Target) -> dict[str, Any]:
    results = suite_results(matrix, target)
    (clean,) = matrix.results[CLEAN, target.label]
    right = worst_case(results, len(matrix.clean), clean.right if len(clean.right) == len(matrix.clean) else None)
    over = sum(result.attacks for result in results)
    row = {**_of_target(matrix, target), "attack": WORST, "eps_255": matrix.config.eps_255, "number": "9"}
    return row | ({"status": NOT_RUN} if right is None else {**_share(right), "note": f"over {over} attacks"})


def _of_target(matrix: Matrix, target: Target) -> dict[str, Any]:
    return {
        "data": name_of(matrix.config.data),
        "victim": target.victim_name,
        "surrogate": target.surrogate,
        "defense": target.label,
        "defense_name": target.defense.name if target.node is None else name_of(target.node),
        "seed": matrix.config.seed,
    }


def _share(right: Tensor) -> dict[str, Any]:
    n, correct = len(right), int(right.sum())
    low, high = (_short(bound) for bound in wilson(correct, n))
    return {"n": n, "correct": correct, "status": DONE, "accuracy": _short(correct / n), "low": low, "high": high}


def _short(value: float) -> float | None:
    return round(value, 6) if isfinite(value) else None  # integers stay integers
