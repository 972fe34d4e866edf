"""Maps sampled reconstructions to the victim's decision space (Algorithm 1, lines 4-6 and 10)."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from dipguard.checks import check_int
from dipguard.decision import quality, sampled_steps
from dipguard.fit.cohort import Cohort, row_ranges
from dipguard.fit.decider import Decider, ask_together, steps_together
from dipguard.fit.module import StackedDIP
from dipguard.fit.record import Sample, StackRecord


class DecisionLogger(pl.Callback):
    """Of each sampled step: the victim and SSIM on all B reconstructions, written to the record.

    The first of the three callbacks: it opens the record that the others read. Means over the stack go to the
    Trainer's loggers, at sampled steps only, since a logging call costs as much as a step. A small stack's samples wait
    until several steps make a good batch for the victim (:func:`~dipguard.fit.decider.steps_together`), and are then
    written one after the other; never where a callback has an attribute ``needs_each_decision`` that is true.

    Args:
        victim: Takes [n, 3, H, W] in [0, 1], returns logits [n, C].
        decisions: Number of sampled steps (section 4.1: 200).
        every: Distance of sampled steps instead of their number.
        K_max: The largest K that a replay of the traces may ask for.
        keep_samples: Keep all sampled reconstructions in the traces.
        first_step: Added to the step numbers of log entries, for runs of several stacks.

    Attributes:
        seconds: Time spent here.
    """

    def __init__(
        self,
        victim: nn.Module,
        *,
        decisions: int | None = 200,
        every: int | None = None,
        K_max: int = 25,
        keep_samples: bool = False,
        first_step: int = 0,
    ) -> None:
        self.decider = Decider(victim)
        self.decisions = decisions
        self.every = every
        self.K_max = check_int(K_max, name="K_max", low=1)
        self.keep_samples = keep_samples
        self.first_step = first_step
        self.seconds = 0.0
        self._steps: frozenset[int] = frozenset()
        self._together = 1
        self._unread: list[tuple[list[Cohort], Sample]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the record; read the given images' decisions."""
        module = as_stacked_dip(pl_module)
        self._steps = frozenset(sampled_steps(module.T, decisions=self.decisions, every=self.every))
        for cohort in module.cohorts:
            cohort.record = None  # of an earlier fit
        self._unread = []
        others = getattr(trainer, "callbacks", ())
        at_once = any(getattr(callback, "needs_each_decision", False) for callback in others)
        self._together = 1 if at_once else steps_together(len(module.given))
        self._open(module)

    def _open(self, module: StackedDIP) -> None:
        for cohort, rows in zip(module.cohorts, row_ranges(module.cohorts), strict=True):
            if cohort.record is None:
                given = module.given[rows]
                cohort.record = StackRecord(
                    given=given,
                    given_scores=self.decider(given),
                    indices=module.indices[rows],
                    K_max=self.K_max,
                    keep_samples=self.keep_samples,
                )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample step t = ``batch_idx``, whose x(t) was made before this step's update."""
        module = as_stacked_dip(pl_module)
        ranges = row_ranges(module.cohorts)
        due = [i for i, cohort in enumerate(module.cohorts) if cohort.step(batch_idx) in self._steps]
        if not due:
            return
        start = time.perf_counter()
        self._open(module)  # newcomers' records
        x, errors, given = (
            part if len(due) == len(ranges) else torch.cat([part[ranges[i]] for i in due])
            for part in (outputs["reconstructions"], outputs["errors"], module.given)
        )
        # Copies: an engine may write its next step into the same memory.
        sample = Sample(batch_idx, x.clone(), x.new_empty(0), quality(x, given), errors.clone())
        self._unread.append(([module.cohorts[i] for i in due], sample))
        if len(self._unread) >= self._together:
            self._ask(trainer)
        self.seconds += time.perf_counter() - start

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask about the samples that still wait."""
        start = time.perf_counter()
        self._ask(trainer)
        self.seconds += time.perf_counter() - start

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """After Ctrl-C, log what has been sampled; other errors may be the victim's own, or memory that has run out."""
        if isinstance(exception, KeyboardInterrupt):
            self._ask(trainer)

    def _ask(self, trainer: pl.Trainer) -> None:
        """Show the waiting samples to the victim in one batch; log and write them one after the other."""
        if not self._unread:
            return
        parts = ask_together(self.decider, [sample.reconstructions for _, sample in self._unread])
        unread, self._unread = self._unread, []
        for (cohorts, sample), part in zip(unread, parts, strict=True):
            self._write(trainer, cohorts, replace(sample, scores=part))

    def _write(self, trainer: pl.Trainer, cohorts: list[Cohort], sample: Sample) -> None:
        self._log(trainer, cohorts, sample)
        for cohort, rows in zip(cohorts, row_ranges(cohorts), strict=True):
            assert cohort.record is not None
            own = sample if len(cohorts) == 1 else sample.rows(rows)
            cohort.record.add_sample(replace(own, step=cohort.step(sample.step)))

    def _log(self, trainer: pl.Trainer, cohorts: list[Cohort], sample: Sample) -> None:
        if not trainer.loggers:
            return
        records = [cohort.record for cohort in cohorts if cohort.record is not None]
        moved = sample.scores.argmax(1) != torch.cat([record.given_scores for record in records]).argmax(1)
        means = torch.stack([sample.errors.mean(), sample.quality.mean(), moved.double().mean().to(sample.errors)])
        error, value, share = means.tolist()
        found = sum(len(crossings) for record in records for crossings in record.crossings) / len(moved)
        figures = {"fit/mse": error, "fit/quality": value, "fit/decision_changed": share, "fit/crossings": found}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=self.first_step + sample.step)


def as_stacked_dip(pl_module: pl.LightningModule) -> StackedDIP:
    """The module as what it must be.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(pl_module, StackedDIP):
        raise TypeError(f"this callback works on a StackedDIP, got {type(pl_module).__name__}")
    return pl_module


def open_records(module: StackedDIP) -> list[tuple[Cohort, StackRecord]]:
    """The cohorts whose records DecisionLogger has opened; newcomers' come with their first sample.

    Raises:
        RuntimeError: There is none: the callbacks stand in the wrong order.
    """
    found = [(cohort, cohort.record) for cohort in module.cohorts if cohort.record is not None]
    if not found:
        raise RuntimeError(
            "`callbacks` must have DecisionLogger before BoundaryDetector and Stitcher, got no DecisionLogger"
        )
    return found
