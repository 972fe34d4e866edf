"""What the callbacks of one stacked fit write, and what becomes of it: one decision trace an image."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dipguard.decision import DecisionTrace, needed_for_replay


@dataclass(frozen=True)
class Sample:
    """One sampled step of a stack of B.

    Attributes:
        step: Optimiser step t.
        reconstructions: x(t), [B, 3, H, W].
        scores: The victim's logits, [B, C].
        quality: v(t), [B].
        errors: Mean squared error, [B].
    """

    step: int
    reconstructions: Tensor
    scores: Tensor
    quality: Tensor
    errors: Tensor

    def rows(self, rows: list[int] | slice) -> Sample:
        """The same step of these images of the stack alone, copied."""
        parts = (part[rows].clone() for part in (self.reconstructions, self.scores, self.quality, self.errors))
        return Sample(self.step, *parts)


@dataclass(frozen=True)
class Crossing:
    """One cross-boundary pair of one image.

    Attributes:
        at: Number of the pair's first sample.
        quality: v(t) of that sample.
        images: x(t) and x(t+1), [2, 3, H, W].
        scores: The victim's logits on them, [2, C].
    """

    at: int
    quality: float
    images: Tensor
    scores: Tensor


Localise = Callable[[Sequence[Crossing]], tuple[Tensor, Tensor]]
"""M crossings to alpha [M] and the on-boundary images [M, 3, H, W]."""
Look = Callable[["StackRecord"], None]


class StackRecord:
    """The running record of a stack of B images, or of those of them that are still fitted.

    Its memory does not grow with T: scalars of the sampled steps, the last ``K_max`` reconstructions, and of the
    crossings those that some replay can still ask for (:func:`dipguard.decision.needed_for_replay`).

    Args:
        given: x0, [B, 3, H, W].
        given_scores: The victim's logits on them, [B, C].
        indices: The images' indices.
        K_max: The largest K that a replay may ask for.
        keep_samples: Keep every sampled reconstruction.

    Attributes:
        steps: The sampled optimiser steps so far.
        look: Called with the record after each new sample; None for nobody.
        localise: How crossings become on-boundary images. It is done when an image's trace is closed, since many
            crossings are forgotten before that.
    """

    def __init__(
        self, *, given: Tensor, given_scores: Tensor, indices: Sequence[int], K_max: int, keep_samples: bool = False
    ) -> None:
        self.given = given
        self.given_scores = given_scores
        self.indices = tuple(indices)
        self.K_max = K_max
        self.crossings: list[list[Crossing]] = [[] for _ in self.indices]
        self.previous: Sample | None = None
        self.newest: Sample | None = None
        self._last: deque[Tensor] = deque(maxlen=K_max)
        self._samples: list[Tensor] | None = [] if keep_samples else None
        self.steps: list[int] = []
        self.look: Look | None = None
        self.localise: Localise | None = None
        self._scalars: list[tuple[Tensor, Tensor, Tensor]] = []
        self._places = tuple(range(len(self.indices)))  # in the stack as it began
        self._retired: dict[int, DecisionTrace] = {}

    @property
    def count(self) -> int:
        """Number of samples so far."""
        return len(self.steps)

    def add_sample(self, sample: Sample) -> None:
        """Append a sampled step; it becomes ``newest``, and the one before it ``previous``."""
        self.previous, self.newest = self.newest, sample
        self._last.append(sample.reconstructions)
        self.steps.append(sample.step)
        self._scalars.append((sample.scores, sample.quality, sample.errors))
        if self._samples is not None:
            self._samples.append(sample.reconstructions.cpu())
        if self.look is not None:
            self.look(self)

    def add_crossing(self, b: int, crossing: Crossing) -> None:
        """Append a crossing of image b, and forget those that no replay can ask for any more."""
        found = [*self.crossings[b], crossing]
        kept = needed_for_replay(torch.tensor([c.quality for c in found], dtype=torch.float64), K_max=self.K_max)
        self.crossings[b] = [c for c, keep in zip(found, kept.tolist(), strict=True) if keep]

    def retire(self, rows: Sequence[int]) -> list[int]:
        """Close the traces of these images, which leave the stack; returns the rows that stay.

        What stays moves up, so that row b of the record is row b of the shrunken stack.
        """
        for b, trace in zip(rows, self._close(list(rows)), strict=True):
            self._retired[self._places[b]] = trace
        stay = [b for b in range(len(self.indices)) if b not in set(rows)]
        self.given, self.given_scores = self.given[stay], self.given_scores[stay]
        self.indices = tuple(self.indices[b] for b in stay)
        self._places = tuple(self._places[b] for b in stay)
        self.crossings = [self.crossings[b] for b in stay]
        self.previous, self.newest = (s if s is None else s.rows(stay) for s in (self.previous, self.newest))
        self._last = deque((x[stay] for x in self._last), maxlen=self.K_max)
        self._scalars = [(scores[stay], v[stay], error[stay]) for scores, v, error in self._scalars]
        if self._samples is not None:
            for i, x in enumerate(self._samples):  # in place: there may be gigabytes of them
                self._samples[i] = x[stay]
        return stay

    def traces(self, settings: Mapping[str, Any]) -> list[DecisionTrace]:
        """One trace an image, on the CPU, in the order in which the stack began."""
        closed = self._retired | dict(zip(self._places, self._close(slice(None)), strict=True))
        full = {**settings, "K_max": self.K_max}
        return [replace(closed[place], settings=dict(full)) for place in sorted(closed)]

    def _close(self, rows: list[int] | slice) -> list[DecisionTrace]:
        """Traces of these rows, without settings."""
        steps = torch.tensor(self.steps, dtype=torch.int64)
        scores, quality, errors = (_gather([scalars[i] for scalars in self._scalars], rows) for i in range(3))
        last = _gather(list(self._last), rows)
        samples = None if self._samples is None else _gather(self._samples, rows)
        given, given_scores = self.given[rows].cpu(), self.given_scores[rows].cpu()
        chosen = range(len(self.indices))[rows] if isinstance(rows, slice) else rows
        alpha, on_boundary = self._localised([c for b in chosen for c in self.crossings[b]])
        made, end = [], 0
        for i, b in enumerate(chosen):
            found = self.crossings[b]
            own = slice(end, end := end + len(found))
            made.append(
                DecisionTrace(
                    index=self.indices[b],
                    given=given[i].clone(),
                    given_scores=given_scores[i].clone(),
                    steps=steps,
                    scores=scores[i].clone(),
                    quality=quality[i].clone(),
                    loss=errors[i].clone(),
                    crossing_at=torch.tensor([c.at for c in found], dtype=torch.int64),
                    alpha=alpha[own].clone(),
                    on_boundary=on_boundary[own].clone(),
                    last=last[i].clone(),
                    samples=None if samples is None else samples[i].clone(),
                )
            )
        return made

    def _localised(self, found: list[Crossing]) -> tuple[Tensor, Tensor]:
        if not found:
            return self.given.new_zeros(0).cpu(), self.given.new_zeros(0, *self.given.shape[1:]).cpu()
        assert self.localise is not None
        alpha, on_boundary = self.localise(found)
        return alpha.cpu(), on_boundary.cpu()


def _gather(sampled: list[Tensor], rows: list[int] | slice) -> Tensor:
    """S tensors [B, ...] -> [len(rows), S, ...] on the CPU."""
    return torch.stack([x[rows] for x in sampled], dim=1).cpu()
