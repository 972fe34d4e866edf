"""Finds cross-boundary pairs as they happen and localises their on-boundary images (Algorithm 1, lines 11-14)."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from dipguard.checks import check_choice, check_int
from dipguard.decision import crosses, localise
from dipguard.decision.boundary import SCORES
from dipguard.fit.decider import Decider
from dipguard.fit.decision_logger import as_stacked_dip, open_record
from dipguard.fit.record import Crossing


class BoundaryDetector(pl.Callback):
    """After DecisionLogger: where two neighbouring samples of an image are decided differently, localise the boundary.

    The thresholds tau and t0 of Eq. 3 are not applied here but when stitching, so that a trace serves all of them.

    Args:
        victim: Takes [n, 3, H, W] in [0, 1], returns logits [n, C].
        N: Sections of the grid of Eq. 5.
        scores: ``logits`` or ``probabilities``, the f_c of Eq. 5.

    Attributes:
        seconds: Time spent here.
    """

    def __init__(self, victim: nn.Module, *, N: int = 10, scores: str = "logits") -> None:
        self.decider = Decider(victim)
        self.N = check_int(N, name="N", low=1)
        self.scores = check_choice(scores, SCORES, name="scores")
        self.seconds = 0.0
        self._seen = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to start without DecisionLogger before this callback."""
        self._seen = open_record(as_stacked_dip(pl_module)).count

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare the newest sample with the one before it, if it is new."""
        record = open_record(as_stacked_dip(pl_module))
        if record.count == self._seen:
            return
        self._seen = record.count
        before, after = record.previous, record.newest
        if before is None or after is None:
            return
        start = time.perf_counter()
        pairs = torch.nonzero(crosses(before.scores.argmax(1), after.scores.argmax(1))).flatten()
        if len(pairs):
            alpha, on_boundary = localise(
                before.reconstructions[pairs],
                after.reconstructions[pairs],
                before.scores[pairs],
                after.scores[pairs],
                self.decider,
                N=self.N,
                scores=self.scores,
            )
            rows = zip(pairs.tolist(), before.quality[pairs].tolist(), alpha.tolist(), on_boundary, strict=True)
            for b, value, weight, image in rows:
                record.add_crossing(b, Crossing(record.count - 2, value, weight, image.clone()))
        self.seconds += time.perf_counter() - start
