"""Finds cross-boundary pairs as they happen, and their on-boundary images (Algorithm 1, lines 11-14)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dipguard.checks import check_choice, check_int
from dipguard.decision import crosses, localise
from dipguard.decision.boundary import SCORES, SEARCHES
from dipguard.fit.decider import Decider
from dipguard.fit.decision_logger import as_stacked_dip, open_records
from dipguard.fit.record import Crossing, StackRecord


class BoundaryDetector(pl.Callback):
    """After DecisionLogger: where two neighbouring samples of an image are decided differently, localise the boundary.

    A pair is kept as it is found, and localised when its image's trace is closed: of some thirty pairs that an attacked
    image shows, a replay with K up to 25 can ask for fewer, and each costs N - 1 readings of the victim.
    The thresholds tau and t0 of Eq. 3 are not applied here but when stitching, so that a trace serves all of them.

    Args:
        victim: Takes [n, 3, H, W] in [0, 1], returns logits [n, C].
        N: Sections of the grid of Eq. 5.
        scores: ``logits`` or ``probabilities``, the f_c of Eq. 5.
        search: ``grid`` or ``bisection`` (:func:`dipguard.decision.boundary.localise`).
    """

    def __init__(self, victim: nn.Module, *, N: int = 10, scores: str = "logits", search: str = "grid") -> None:
        self.decider = Decider(victim)
        self.N = check_int(N, name="N", low=1)
        self.scores = check_choice(scores, SCORES, name="scores")
        self.search = check_choice(search, SEARCHES, name="search")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the records; refuse to start without DecisionLogger before this callback."""
        for _, record in open_records(as_stacked_dip(pl_module)):
            self._watch(record)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Watch the records of newcomers too: a new one holds a single sample, and no pair."""
        for cohort in as_stacked_dip(pl_module).cohorts:
            if cohort.record is not None:
                self._watch(cohort.record)

    def _watch(self, record: StackRecord) -> None:
        record.look, record.localise = self.look, self.localise

    def look(self, record: StackRecord) -> None:
        """Compare a record's newest sample with the one before it; the time is DecisionLogger's."""
        before, after = record.previous, record.newest
        if before is None or after is None:
            return
        rows: list[int] = torch.nonzero(crosses(before.scores.argmax(1), after.scores.argmax(1))).flatten().tolist()
        for b in rows:
            images = torch.stack([before.reconstructions[b], after.reconstructions[b]])
            scores = torch.stack([before.scores[b], after.scores[b]])
            record.add_crossing(b, Crossing(record.count - 2, float(before.quality[b]), images, scores))

    def localise(self, found: Sequence[Crossing]) -> tuple[Tensor, Tensor]:
        """Alpha [M] and the on-boundary images [M, 3, H, W] of M crossings, of whichever images (Eq. 4 and 5).

        The time is that of the callback which closes a trace.
        """
        # A victim's batch at a time: the grid's images of all would take some hundred megabytes.
        size = max(1, self.decider.batch // max(1, self.N - 1))
        parts = [self._localise(found[first : first + size]) for first in range(0, len(found), size)]
        return torch.cat([alpha for alpha, _ in parts]), torch.cat([images for _, images in parts])

    def _localise(self, found: Sequence[Crossing]) -> tuple[Tensor, Tensor]:
        images, scores = (torch.stack(part, dim=1) for part in ([c.images for c in found], [c.scores for c in found]))
        ends = (images[0], images[1], scores[0], scores[1])
        return localise(*ends, self.decider, N=self.N, scores=self.scores, search=self.search)
