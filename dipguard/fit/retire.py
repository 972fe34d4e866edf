"""Images whose crossings have been found leave the stack before the fit's end: an option, and no part of the paper."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from dipguard.checks import check_int
from dipguard.decision import passes
from dipguard.engines.base import kept_rows
from dipguard.fit.decision_logger import as_stacked_dip, open_record
from dipguard.fit.module import StackedDIP
from dipguard.fit.record import StackRecord
from dipguard.fit.stitcher import StitchOptions


class Retirement(pl.Callback):
    """After BoundaryDetector: ends the fit of each image that has its K crossings and has seen no new one for a while.

    Only crossings count that pass tau and t0 (Eq. 3). Eq. 7 takes the last K of them, so what is lost are those that
    would have come after so long a silence. An image without K crossings is fitted to the end. The other images go on
    as if nothing had happened; the stack shrinks.

    Args:
        options: tau, t0, K and their readings.
        patience: Samples without a new crossing, at least 1.

    Attributes:
        seconds: Time spent here.
    """

    def __init__(self, options: StitchOptions, *, patience: int) -> None:
        self.options = options
        self.patience = check_int(patience, name="patience", low=1)
        self.seconds = 0.0
        self._seen = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What the length of a trace depends on."""
        options = self.options
        return {name: getattr(options, name) for name in ("tau", "t0", "K", "rule", "t0_unit")}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to start without DecisionLogger before this callback."""
        self._seen = open_record(as_stacked_dip(pl_module)).count

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look for finished images at each new sample."""
        module = as_stacked_dip(pl_module)
        record = open_record(module)
        if record.count == self._seen:
            return
        self._seen = record.count
        start = time.perf_counter()
        rows = [b for b in range(len(record.indices)) if self._finished(record, b)]
        if len(rows) == len(record.indices):
            trainer.should_stop = True  # before the next step; the record is closed as at any fit's end
        elif rows:
            keep(module, trainer.optimizers[0], record.retire(rows))
        self.seconds += time.perf_counter() - start

    def _finished(self, record: StackRecord, b: int) -> bool:
        found, options = record.crossings[b], self.options
        if len(found) < options.K:
            return False
        at = torch.tensor([crossing.at for crossing in found])
        counted = passes(
            torch.tensor([crossing.quality for crossing in found], dtype=torch.float64),
            torch.tensor(record.steps)[at],
            tau=options.tau,
            t0=options.t0,
            rule=options.rule,
            t0_unit=options.t0_unit,
            position=at,
        )
        # A crossing lies between the samples `at` and `at` + 1; all later ones were silent.
        return int(counted.sum()) >= options.K and record.count - 2 - int(at[counted][-1]) >= self.patience


def keep(module: StackedDIP, optimizer: torch.optim.Optimizer, rows: list[int]) -> None:
    """Go on with these rows of the stack alone: images, z, jitter, weights and Adam's moments."""
    kept = torch.tensor(rows, device=module.given.device)
    with torch.no_grad():
        module.engine.keep(kept)
        module.indices = tuple(module.indices[b] for b in rows)
        module.given = module.given[kept]
        if isinstance(module.z, nn.Parameter):
            module.z.grad = None
            module.z.data = kept_rows(module.z.data, kept)
        else:
            module.z = module.z[kept]
        if module._jitter is not None:
            module._jitter.keep(rows)
        for moments in optimizer.state.values():
            for name, value in moments.items():
                if value.ndim:  # the number of steps is one for all
                    moments[name] = kept_rows(value, kept)
