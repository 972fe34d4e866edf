"""What a log is told of the fits of a matrix: how decisions and quality went along them, and some traces in full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dipguard.decision import DecisionTrace
from dipguard.defenses.guard_row import GuardRow
from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.matrix_run import attacked_images
from dipguard.files import tensor_digest

_Key = tuple[str, int, str]


@dataclass(frozen=True, eq=False)
class Course:
    """The course of one image's fit: steps [S], decisions y(t) [S], quality v(t) [S], decision on the given image."""

    steps: Tensor
    decisions: Tensor
    quality: Tensor
    given_decision: int


class Courses:
    """Watches the proposed defence's rows of a matrix, whether they fit or take their fits from a store.

    What is kept is small: two numbers a sample, and of the first images the whole trace. Cells that an earlier session
    finished are not fitted, and so are not here.

    Args:
        matrix: The matrix that will run.
        keep: Images whose traces are kept.
    """

    def __init__(self, matrix: Matrix, *, keep: int) -> None:
        self.matrix = matrix
        self.kept = {int(index) for index in matrix.clean.indices[:keep]}
        self._courses: dict[_Key, Course] = {}
        self._traces: dict[_Key, DecisionTrace] = {}

    @property
    def rows(self) -> list[str]:
        """The rows that are watched."""
        return [row for row, defense in self.matrix.rows.items() if isinstance(defense, GuardRow)]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what is fitted meanwhile."""
        for row in self.rows:
            self.matrix.rows[row].guard.watch = partial(self._see, row)
        try:
            yield
        finally:
            for row in self.rows:
                self.matrix.rows[row].guard.watch = None

    def curves(self, column: str, row: str) -> dict[int, dict[str, float]]:
        """Means over a column's images by sampled step; empty unless all of its fits were seen.

        ``quality`` is the mean SSIM of x(t) to the given image, ``accuracy`` the share of x(t) that the victim reads
        rightly, ``changed`` the share that it reads otherwise than the given image; all in [0, 1].
        """
        courses = [self._courses.get(key) for key in self._keys(column, row)]
        seen = [course for course in courses if course is not None]
        if len(seen) < len(courses):
            return {}
        decisions = torch.stack([course.decisions for course in seen])
        quality = torch.stack([course.quality for course in seen]).double().mean(0)
        right = (decisions == self.matrix.clean.labels[:, None]).double().mean(0)
        changed = (decisions != torch.tensor([course.given_decision for course in seen])[:, None]).double().mean(0)
        return {
            int(step): {"quality": float(quality[i]), "accuracy": float(right[i]), "changed": float(changed[i])}
            for i, step in enumerate(seen[0].steps)
        }

    def traces(self, column: str, row: str) -> dict[int, DecisionTrace]:
        """The traces that were kept, by the image's position."""
        found = {i: self._traces.get(key) for i, key in enumerate(self._keys(column, row))}
        return {i: trace for i, trace in found.items() if trace is not None}

    def _keys(self, column: str, row: str) -> list[_Key]:
        images, indices = attacked_images(self.matrix, column)["images"], self.matrix.clean.indices
        dtype = getattr(torch, self.matrix.rows[row].guard.fit_options.dtype)
        return [(row, int(i), tensor_digest([x.to(dtype)])) for x, i in zip(images, indices, strict=True)]

    def _see(self, row: str, traces: Sequence[DecisionTrace]) -> None:
        for trace in traces:
            # By the image itself: whoever purifies does not know of columns.
            key = (row, trace.index, tensor_digest([trace.given]))
            self._courses[key] = Course(trace.steps, trace.decisions, trace.quality, trace.given_decision)
            if trace.index in self.kept:
                self._traces[key] = replace(trace, samples=None)
