"""Images whose crossings have been found leave the stack before the fit's end: an option, and no part of the paper."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch

from dipguard.checks import check_int
from dipguard.decision import passes
from dipguard.fit.cohort import Cohort
from dipguard.fit.decision_logger import as_stacked_dip, open_records
from dipguard.fit.module import StackedDIP
from dipguard.fit.record import StackRecord
from dipguard.fit.slots import refill, release
from dipguard.fit.stitcher import StitchOptions


class Retirement(pl.Callback):
    """After BoundaryDetector: ends the fit of each image that has its K crossings and has seen no new one for a while.

    Only crossings count that pass tau and t0 (Eq. 3). Eq. 7 takes the last K of them, so what is lost are those that
    would have come after so long a silence. An image without K crossings is fitted to the end. The other images go on
    as if nothing had happened; images that wait take the free places (:mod:`dipguard.fit.slots`), or the stack shrinks.

    Args:
        options: tau, t0, K and their readings.
        patience: Samples without a new crossing, at least 1.

    Attributes:
        needs_each_decision: Makes DecisionLogger ask at every sampled step.
        seconds: Time spent here.
    """

    needs_each_decision: ClassVar[bool] = True

    def __init__(self, options: StitchOptions, *, patience: int) -> None:
        self.options = options
        self.patience = check_int(patience, name="patience", low=1)
        self.seconds = 0.0

    @property
    def settings(self) -> dict[str, Any]:
        """What the length of a trace depends on."""
        options = self.options
        return {name: getattr(options, name) for name in ("tau", "t0", "K", "rule", "t0_unit")}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to start without DecisionLogger before this callback."""
        open_records(as_stacked_dip(pl_module))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look for finished images at each new sample; let them go, and others come."""
        start = time.perf_counter()
        module = as_stacked_dip(pl_module)
        gone = [self._gone(cohort, module, batch_idx) for cohort in module.cohorts]
        if any(gone):
            self._let_go(trainer, module, gone, batch_idx)
        self.seconds += time.perf_counter() - start

    def _gone(self, cohort: Cohort, module: StackedDIP, batch_idx: int) -> list[int]:
        """Rows of a cohort that are fitted no further."""
        if module.waiting is not None and cohort.step(batch_idx) == module.T - 1:
            return list(range(cohort.rows))
        record = cohort.record
        if record is None or not cohort.sampled_at(batch_idx):
            return []
        return [b for b in range(cohort.rows) if self._finished(record, b)]

    def _let_go(self, trainer: pl.Trainer, module: StackedDIP, gone: list[list[int]], batch_idx: int) -> None:
        cohorts = list(module.cohorts)
        staying = len(module.indices) - sum(map(len, gone))
        optimizer = trainer.optimizers[0]
        come = refill(module, optimizer, fitted=staying, next_step=batch_idx + 1)
        if staying + come == 0:
            trainer.should_stop = True  # before the next step; the records are closed as at any fit's end
            return
        stay = [list(range(cohort.rows)) for cohort in module.cohorts]
        for i, (cohort, rows) in enumerate(zip(cohorts, gone, strict=True)):
            module.spared += len(rows) * (module.T - 1 - cohort.step(batch_idx))
            if rows:
                assert cohort.record is not None
                stay[i] = cohort.record.retire(rows)
        release(module, optimizer, stay)

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
