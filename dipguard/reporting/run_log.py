"""What a run enters into its log while it works: the curves of its fits, each finished cell, at the end its images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dipguard.decision import DecisionTrace
from dipguard.evaluation.cell import Cell
from dipguard.evaluation.curves import Row
from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.results import result_row
from dipguard.reporting.cell_figures import draw_cell, trace_paths
from dipguard.reporting.loggers import CELLS, Rows, open_rows
from dipguard.reporting.results import flatten
from dipguard.store import digest_of

FIGURES = ("accuracy", "low", "high", "ssim", "psnr", "n", "seconds_per_image", "attack_seconds")
MOST_TRACES = 64
"""Most traces of a cell that its curve of accuracy is a mean over; they are large."""
MOST_PICTURES = 1000
"""Rows of the table of images that have pictures, about; of each cell at least those that are drawn."""


@contextlib.contextmanager
def open_log(matrix: Matrix, *, job_type: str = "fit", group: str | None = None) -> Iterator[RunLog | None]:
    """The log of a run, closed at the end in any case; None if the config has ``logger.kind=none``.

    ``job_type`` (``fit``, ``evaluate`` or ``sweep``) and ``group`` (the sweep) are for W&B.
    """
    with open_rows(matrix.config, matrix.folder, job_type=job_type, group=group) as rows:
        yield None if rows is None else RunLog(matrix, rows)


class RunLog:
    """The log of a matrix (:class:`dipguard.evaluation.runner.Log`).

    Curves of one cell are those of all its fits, one after the other. In a matrix of many, a cell is followed in its
    first stack, under ``fit/<defense>/<attack>/``.
    """

    def __init__(self, matrix: Matrix, rows: Rows) -> None:
        self.matrix, self.rows = matrix, rows
        self.single = len(matrix.cells) == 1
        self._done: list[Cell] = []
        self._summary: dict[str, Any] = {}

    def curves(self, cell: Cell, *, chunk: int) -> Row | None:
        """Where the curves of a chunk of this number go."""
        if chunk and not self.single:
            return None
        self.rows.save()
        first, longest = chunk * self.matrix.chunk_steps(cell), cell.defense.steps_per_image

        def row(step: int, metrics: Mapping[str, float]) -> None:
            if self.single or step < longest:
                key = " ".join([cell.key[:16], f"{chunk}:{step}", *sorted(metrics)])
                self.rows.add(
                    key, {self._name(cell, name): value for name, value in metrics.items()}, step=first + step
                )

        return row

    def finished(self, cell: Cell) -> None:
        """Enter a finished cell, with a panel and the decision traces of its first images if it has a DIP."""
        self._done.append(cell)
        for chunk, curve in enumerate(self.matrix.curves(cell)):
            row = self.curves(cell, chunk=chunk)
            for step, metrics in curve if row is not None else ():
                row(step, metrics)
        result, (attack, defense) = self.matrix.results[cell.place][-1], cell.place
        found = result_row(self.matrix, result)
        figures = {name: found[name] for name in FIGURES if found[name] is not None}
        alike = [done for done in self._done if done.target is cell.target and not done.check]
        means = [float(self.matrix.results[done.place][-1].right.double().mean()) for done in alike]
        of_cell = {f"result/{defense}/{attack}/{name}": value for name, value in figures.items()}
        if means:
            of_cell[f"result/{defense}/mean_accuracy"] = sum(means) / len(means)
        self._summary |= of_cell
        if cell.key in self.rows.keys:
            return
        self._accuracy_of_fits(cell)
        place = f"_{defense}.{attack}"
        drawn = draw_cell(self.matrix, result, place) if cell.defense.steps_per_image and not self.single else []
        pictures = {f"figures/{defense}/{attack}/{path.stem.replace(place, '')}": path for path in drawn}
        number, seconds = len(self._done), sum(result.seconds.values())
        own = {f"cells/{name}": value for name, value in {**figures, "seconds": seconds}.items()}
        self.rows.add(cell.key, {CELLS: number, **own, **of_cell}, step=number, pictures=pictures)
        self.rows.save()

    def results(self, metrics: Mapping[str, Any], figures: Sequence[Path]) -> None:
        """Enter the run's own metrics and figures, the table of its images and, if they are wanted, its artifacts."""
        key = digest_of([cell.key for cell in self._done])
        flat = {name: v for name, v in flatten(metrics, "result/", sep="/").items() if isinstance(v, int | float)}
        pictures = {f"figures/{path.stem}": path for path in figures}
        self.rows.add(f"result {key}", flat, pictures=pictures)
        self.rows.table(f"images {key}", pd.read_csv(self.matrix.folder / "images.csv"), self._pictures)
        if self.matrix.config.logger.get("artifacts"):
            self.rows.upload(f"artifact {key}", "reconstructions", self._fill)
        self.rows.summarise({**self._summary, **flat})

    def _name(self, cell: Cell, name: str) -> str:
        return name if self.single else "/".join(["fit", *reversed(cell.place), name.removeprefix("fit/")])

    def _accuracy_of_fits(self, cell: Cell) -> None:
        """Log the share of the sampled x(t) that are classified correctly, from the traces that are kept."""
        right, steps = [], torch.empty(0)
        for i, path in list(trace_paths(self.matrix, self.matrix.results[cell.place][-1]).items())[:MOST_TRACES]:
            trace = DecisionTrace.load(path)
            steps = trace.steps
            right.append((trace.decisions == cell.clean.labels[i]).double())
        means = torch.stack(right).mean(dim=0).tolist() if right else []
        for step, value in zip(steps.tolist(), means, strict=True):
            name = self._name(cell, "fit/accuracy")
            self.rows.add(f"{cell.key[:16]} {step} {name}", {name: value}, step=step)

    def _pictures(self) -> dict[str, list[Tensor | None]]:
        """Columns of pictures for images.csv: clean, given and reconstruction."""
        columns: dict[str, list[Tensor | None]] = {"clean": [], "given": [], "reconstruction": []}
        results = [result for cell in self.matrix.cells for result in self.matrix.results[cell.place] if result.done]
        most = max(self.matrix.config.figures, MOST_PICTURES // max(1, len(results)))
        for budget, result in ((self.matrix.results[one.cell.place].index(one), one) for one in results):
            shown = {
                "clean": result.cell.clean.images,
                "given": self.matrix.attacked(*result.cell.place, snapshot=budget),
                "reconstruction": self.matrix.reconstructions(*result.cell.place, snapshot=budget),
            }
            for name, images in shown.items():
                columns[name] += [*images[:most], *[None] * (len(images) - most)]
        return columns if self.matrix.config.figures else {}

    def _fill(self, artifact: Any) -> None:
        """Add all reconstructions, and the traces that are kept."""
        for cell in self._done:
            attack, defense = cell.place
            with artifact.new_file(f"reconstructions/{attack}/{defense}.npz", mode="wb") as file:
                images = self.matrix.reconstructions(attack, defense).numpy()
                np.savez_compressed(file, images=images, indices=cell.clean.indices.numpy())
        if (traces := self.matrix.folder / "traces").is_dir():
            artifact.add_dir(str(traces), name="traces")
