"""From stored cells to results.csv (a row a cell) and images.csv (a row an image and cell)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.statistics import wilson
from dipguard.files import write_text

FIELDS = (
    "data", "victim", "judge", "column", "attack", "eps_255", "row", "defense", "seed", "n", "correct", "accuracy",
    "low", "high", "ssim", "psnr", "seconds_per_image", "status", "key",
)  # fmt: skip
IMAGE_FIELDS = (
    "column", "row", "index", "label", "decision_clean", "decision_given", "decision_defended", "ssim", "psnr",
)  # fmt: skip
DONE = "done"


def write_results(matrix: Matrix) -> None:
    """Write results.csv and images.csv from the cells that are stored; those of other settings are left out."""
    cells: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    for column in matrix.config.columns:
        for row in matrix.config.rows:
            entry = _cell(matrix, column, row)
            if entry is None:
                continue
            values, arrays = entry
            cells.append(values)
            if arrays is not None:
                images += _images(matrix, column, row, arrays)
    write_text(matrix.folder.path / "results.csv", csv_text(FIELDS, cells))
    write_text(matrix.folder.path / "images.csv", csv_text(IMAGE_FIELDS, images))


def defense_name(matrix: Matrix, row: str) -> str:
    """A row's defence, with the classifier that guides it where that is not the victim (appendix E)."""
    name, guide = matrix.config.rows[row].name, matrix.config.guide
    return name if guide is None else f"{name} guided by {guide.name}"


def csv_text(fields: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    """Rows as CSV; None is an empty field."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _cell(matrix: Matrix, column: str, row: str) -> tuple[dict[str, Any], dict[str, Any] | None] | None:
    config, defense, attack = matrix.config, matrix.rows[row], matrix.config.columns[column]
    values: dict[str, Any] = {
        "data": config.data.name,
        "victim": config.victim.name,
        "judge": config.victim.name,
        "column": column,
        "attack": attack.name,
        "eps_255": attack.eps_255,
        "row": row,
        "defense": defense_name(matrix, row),
        "seed": config.seed,
        "n": len(matrix.clean),
        "key": matrix.cell_key(column, row),
    }
    if defense.unavailable is not None:
        return {**values, "status": defense.unavailable}, None
    arrays = matrix.folder.load(matrix.folder.cell_path(column, row), key=values["key"])
    if arrays is None:
        return None
    correct = int((arrays["decisions"] == matrix.clean.labels.numpy()).sum())
    low, high = wilson(correct, len(matrix.clean))
    finite = arrays["psnr"][np.isfinite(arrays["psnr"])]
    figures = {
        "correct": correct,
        "accuracy": correct / len(matrix.clean),
        "low": low,
        "high": high,
        "ssim": float(arrays["ssim"].mean()),
        # An image that comes back unchanged has an infinite PSNR: the mean is that of the others.
        "psnr": float(finite.mean()) if len(finite) else None,
        "seconds_per_image": float(arrays["seconds"]) / len(matrix.clean),
        "status": DONE,
    }
    return {**values, **{name: _short(value) for name, value in figures.items()}}, arrays


def _images(matrix: Matrix, column: str, row: str, arrays: dict[str, Any]) -> Iterator[dict[str, Any]]:
    attacked = matrix.folder.load(matrix.folder.attacked_path(column), key=matrix.column_key(column))
    given = attacked["decisions"].tolist() if attacked is not None else [None] * len(matrix.clean)
    for number in range(len(matrix.clean)):
        yield {
            "column": column,
            "row": row,
            "index": int(matrix.clean.indices[number]),
            "label": int(matrix.clean.labels[number]),
            "decision_clean": int(matrix.decisions_clean[number]),
            "decision_given": given[number],
            "decision_defended": int(arrays["decisions"][number]),
            "ssim": _short(float(arrays["ssim"][number])),
            "psnr": _short(float(arrays["psnr"][number])),
        }


def _short(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value
