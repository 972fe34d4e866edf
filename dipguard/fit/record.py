"""What the callbacks of one stacked fit write, and what becomes of it: one decision trace an image."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Crossing:
    """One localised cross-boundary pair of one image.

    Attributes:
        at: Number of the pair's first sample.
        quality: v(t) of that sample.
        alpha: Its weight in the on-boundary image.
        on_boundary: x_db, [3, H, W].
    """

    at: int
    quality: float
    alpha: float
    on_boundary: Tensor


class StackRecord:
    """The running record of a stack of B images.

    Its memory does not grow with T: scalars of the sampled steps, the last ``K_max`` reconstructions, and of the
    crossings those that some replay can still ask for (:func:`dipguard.decision.needed_for_replay`).

    Args:
        given: x0, [B, 3, H, W].
        given_scores: The victim's logits on them, [B, C].
        indices: The images' indices.
        K_max: The largest K that a replay may ask for.
        keep_samples: Keep every sampled reconstruction.
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
        self._scalars: list[tuple[int, Tensor, Tensor, Tensor]] = []

    @property
    def count(self) -> int:
        """Number of samples so far."""
        return len(self._scalars)

    def add_sample(self, sample: Sample) -> None:
        """Append a sampled step; it becomes ``newest``, and the one before it ``previous``."""
        self.previous, self.newest = self.newest, sample
        self._last.append(sample.reconstructions)
        self._scalars.append((sample.step, sample.scores, sample.quality, sample.errors))
        if self._samples is not None:
            self._samples.append(sample.reconstructions.cpu())

    def add_crossing(self, b: int, crossing: Crossing) -> None:
        """Append a crossing of image b, and forget those that no replay can ask for any more."""
        found = [*self.crossings[b], crossing]
        kept = needed_for_replay(torch.tensor([c.quality for c in found], dtype=torch.float64), K_max=self.K_max)
        self.crossings[b] = [c for c, keep in zip(found, kept.tolist(), strict=True) if keep]

    def traces(self, settings: Mapping[str, Any]) -> list[DecisionTrace]:
        """One trace an image, on the CPU, in the order of the stack."""
        steps = torch.tensor([step for step, *_ in self._scalars], dtype=torch.int64)
        scores = torch.stack([s for _, s, _, _ in self._scalars], dim=1).cpu()
        quality = torch.stack([q for _, _, q, _ in self._scalars], dim=1).cpu()
        errors = torch.stack([e for _, _, _, e in self._scalars], dim=1).cpu()
        last = torch.stack(list(self._last), dim=1).cpu()
        samples = None if self._samples is None else torch.stack(self._samples, dim=1)
        given, given_scores = self.given.cpu(), self.given_scores.cpu()
        made = []
        for b, index in enumerate(self.indices):
            found = self.crossings[b]
            shape = given.shape[1:]
            made.append(
                DecisionTrace(
                    index=index,
                    given=given[b].clone(),
                    given_scores=given_scores[b].clone(),
                    steps=steps,
                    scores=scores[b].clone(),
                    quality=quality[b].clone(),
                    loss=errors[b].clone(),
                    crossing_at=torch.tensor([c.at for c in found], dtype=torch.int64),
                    alpha=torch.tensor([c.alpha for c in found], dtype=given.dtype),
                    on_boundary=torch.stack([c.on_boundary for c in found]).cpu()
                    if found
                    else given.new_zeros(0, *shape),
                    last=last[b].clone(),
                    samples=None if samples is None else samples[b].clone(),
                    settings={**settings, "K_max": self.K_max},
                )
            )
        return made
