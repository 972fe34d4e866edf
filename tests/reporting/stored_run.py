"""Writes results.csv and curves.csv as a run stores them: the input of what reads them."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dipguard.evaluation.statistics import wilson

RESULT_FIELDS = (
    "data", "victim", "judge", "column", "attack", "eps_255", "row", "defense", "seed", "n", "correct", "accuracy",
    "low", "high", "ssim", "psnr", "seconds_per_image", "status", "key",
)  # fmt: skip
CURVE_FIELDS = (
    "data", "victim", "attack", "row", "defense", "eps_255", "budget", "n", "correct", "accuracy", "low", "high",
    "purifications", "dip_steps", "victim_queries", "seconds",
)  # fmt: skip

LINF = {f"{attack}_{eps}": (attack, eps) for attack in ("fgsm", "pgd", "bim", "mifgsm") for eps in (2, 4, 8)}
PAPER_COLUMNS: dict[str, tuple[str, Any]] = {"clean": ("none", ""), **LINF, "cw": ("cw", ""), "ddn": ("ddn", "")}
NO_WEIGHTS = "weights not supplied. Give `weights`, the path of a state dict; the authors' file"


def shares(correct: int, n: int) -> dict[str, Any]:
    low, high = wilson(correct, n)
    return {"n": n, "correct": correct, "accuracy": correct / n, "low": low, "high": high}


def cell(
    column: str, row: str, correct: int | None, *, n: int = 32, ssim: float = 0.9, **changes: Any
) -> dict[str, Any]:
    """A line of results.csv; ``correct`` None is a row whose weights were not supplied."""
    attack, eps = PAPER_COLUMNS.get(column, (column, ""))
    values = {
        "data": "cifar10", "victim": "cifar10_resnet56", "judge": "cifar10_resnet56", "column": column,
        "attack": attack, "eps_255": eps, "row": row, "defense": row, "seed": 0, "key": "0123456789abcdef",
    }  # fmt: skip
    if correct is None:
        values |= {"n": n, "status": NO_WEIGHTS}
    else:
        values |= shares(correct, n) | {"ssim": ssim, "psnr": 30.5, "seconds_per_image": 0.25, "status": "done"}
    return values | changes


def point(
    attack: str, row: str, eps: float, budget: int, correct: int, *, n: int = 16, **changes: Any
) -> dict[str, Any]:
    """A line of curves.csv."""
    names = {"data": "cifar10", "victim": "cifar10_resnet56", "attack": attack, "row": row, "defense": row}
    costs = {"purifications": 9, "dip_steps": 9000, "victim_queries": 9, "seconds": 1.5}
    return {**names, "eps_255": eps, "budget": budget, **shares(correct, n), **costs, **changes}


def write_lines(path: Path, fields: Iterable[str], lines: Iterable[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(fields))
        writer.writeheader()
        writer.writerows(lines)
    return path


def write_results(folder: Path, lines: Iterable[dict[str, Any]]) -> Path:
    return write_lines(folder / "results.csv", RESULT_FIELDS, lines)


def write_curves(folder: Path, lines: Iterable[dict[str, Any]]) -> Path:
    return write_lines(folder / "curves.csv", CURVE_FIELDS, lines)
