"""A matrix's results in its log: curves along the fits, pictures, the table of images, the final figures."""

from __future__ import annotations

import csv
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from dipguard.decision import DecisionTrace
from dipguard.evaluation.courses import Courses
from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.matrix_run import attacked_images
from dipguard.evaluation.metrics import decide
from dipguard.reporting.canvas import Picture, save_figure
from dipguard.reporting.comparison_figure import class_name
from dipguard.reporting.loggers import MOST_FIGURES, RunLog
from dipguard.reporting.panel_figure import draw_panel
from dipguard.reporting.stored_results import ResultRow, read_results
from dipguard.reporting.trace_figure import draw_trace


def log_matrix(log: RunLog, matrix: Matrix, courses: Courses) -> None:
    """Enter a finished matrix into its log; the run folder's files are the truth, and are read here."""
    cells = [(column, row) for column in matrix.config.columns for row in courses.rows]
    _log_curves(log, courses, cells)
    figures = [_draw(matrix, courses, column, row) for column, row in cells]
    # All panels and traces of the first images come before those of the second.
    in_turn = [path for path in chain.from_iterable(zip_longest(*figures)) if path is not None]
    with (matrix.folder.path / "images.csv").open(newline="", encoding="utf-8") as file:
        rows = [{name: _number(text) for name, text in line.items()} for line in csv.DictReader(file)]
    log.log_results(final_metrics(read_results(matrix.folder.path / "results.csv")), rows, in_turn[:MOST_FIGURES])


def final_metrics(results: list[ResultRow]) -> dict[str, Any]:
    """The figures of merit of each cell, ``row.column.accuracy`` and so on, and each row's mean accuracy."""
    metrics: dict[str, Any] = {}
    for cell in (cell for cell in results if cell.done):
        values = {name: getattr(cell, name) for name in ("accuracy", "low", "high", "ssim", "psnr", "n")}
        known = {name: value for name, value in values.items() if value is not None}
        metrics.setdefault(cell.row, {})[cell.column] = known
    for columns in metrics.values():
        columns["mean_accuracy"] = sum(values["accuracy"] for values in columns.values()) / len(columns)
    return metrics


def _log_curves(log: RunLog, courses: Courses, cells: list[tuple[str, str]]) -> None:
    by_step: dict[int, dict[str, float]] = {}
    for column, row in cells:
        for step, means in courses.curves(column, row).items():
            by_step.setdefault(step, {}).update({f"fit/{row}.{column}.{name}": v for name, v in means.items()})
    for step in sorted(by_step):
        log.log_metrics(by_step[step], step=step)


def _draw(matrix: Matrix, courses: Courses, column: str, row: str) -> list[Path]:
    """A panel and the decision traces of a cell's first images, into the run folder's ``figures``."""
    traces = courses.traces(column, row)
    if not traces:
        return []
    options = matrix.rows[row].guard.stitch_options
    given = attacked_images(matrix, column)
    folder = matrix.folder.path / "figures"
    paths, panel = [], {}
    for i, trace in traces.items():
        rebuilt = options.apply(trace)
        decision = int(decide(matrix.victim, rebuilt.image[None].to(matrix.clean.images).to(matrix.device))[0])
        label = int(matrix.clean.labels[i])

        def picture(image: Tensor, y: int, label: int = label) -> Picture:
            return Picture(image, class_name(y, matrix.clean.classes), y == label)

        panel[f"image {trace.index}\ntrue: {class_name(label, matrix.clean.classes)}"] = (
            picture(matrix.clean.images[i], int(matrix.decisions_clean[i])),
            picture(given["images"][i], int(given["decisions"][i])),
            picture(rebuilt.image, decision),
        )
        figure = draw_trace(
            trace,
            rebuilt,
            tau=options.tau,
            t0_step=_warm_up(trace, options.t0, in_samples=options.t0_unit == "samples"),
            decision=decision,
            label=label,
            clean=matrix.clean.images[i],
            name_of=lambda y: class_name(y, matrix.clean.classes),
        )
        paths.append(save_figure(figure, folder / f"trace_{row}_{column}_{trace.index:06d}.png"))
    return [save_figure(draw_panel(panel), folder / f"panel_{row}_{column}.png"), *paths]


def _warm_up(trace: DecisionTrace, t0: int, *, in_samples: bool) -> int:
    """The end of the warm-up in optimiser steps."""
    return int(trace.steps[min(t0, len(trace.steps) - 1)]) if in_samples else t0


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text
