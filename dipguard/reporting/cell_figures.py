"""Pictures of one cell: clean, given and purified images, and their decision traces."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from dipguard.decision import DecisionTrace
from dipguard.evaluation.cell import CellResult
from dipguard.evaluation.matrix import Matrix
from dipguard.reporting.canvas import Picture, class_name, save_figure
from dipguard.reporting.image_figures import draw_panel
from dipguard.reporting.trace_figure import draw_trace


def trace_paths(matrix: Matrix, result: CellResult) -> dict[int, Path]:
    """The files of a cell's traces that are kept, by the position of the image."""
    paths = [matrix.traces_path(*result.cell.place, index) for index in result.cell.clean.indices.tolist()]
    return {i: path for i, path in enumerate(paths) if result.done and path.is_file()}


def pictures_of(matrix: Matrix, result: CellResult) -> list[list[Picture]]:
    """Clean, attacked and purified picture of each image that is drawn."""
    clean, place, count = result.cell.clean, result.cell.place, matrix.config.figures
    images = (clean.images, matrix.attacked(*place), matrix.reconstructions(*place))
    decisions = (result.cell.target.decisions_clean, result.decisions_given, result.decisions)
    columns = []
    for shown, found, ssim in zip(images, decisions, (None, result.ssim_given, result.ssim), strict=True):
        captions = [f"SSIM {x:.3f}" if x == x else "" for x in ([] if ssim is None else ssim[:count].tolist())]
        rows = zip(shown[:count], found.tolist(), clean.labels.tolist(), captions or [""] * count, strict=False)
        columns.append([Picture(x, class_name(y, clean.classes), y == label, text) for x, y, label, text in rows])
    return [list(row) for row in zip(*columns, strict=False)]


def draw_cell(matrix: Matrix, result: CellResult, name: str) -> list[Path]:
    """A panel of a cell's first images and the decision trace of each, as far as it is kept, in ``figures/``."""
    if not matrix.config.figures:
        return []
    clean, folder, traces = result.cell.clean, matrix.folder / "figures", trace_paths(matrix, result)
    rows, paths = {}, []
    for i, pictures in enumerate(pictures_of(matrix, result)):
        index, label = int(clean.indices[i]), int(clean.labels[i])
        rows[f"image {index}\ntrue: {class_name(label, clean.classes)}"] = pictures
        if i in traces:
            trace = DecisionTrace.load(traces[i])
            known: dict[str, Any] = {"decision": int(result.decisions[i]), "label": label, "clean": clean.images[i]}
            name_of = partial(class_name, classes=clean.classes)
            figure = draw_trace(trace, result.cell.defense.rebuild(trace), name_of=name_of, **known)
            paths.append(save_figure(figure, folder / f"trace{name}_{index:06d}.png"))
    return [save_figure(draw_panel(rows), folder / f"panel{name}.png"), *paths]
