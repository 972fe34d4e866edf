"""Maps sampled reconstructions to the victim's decision space (Algorithm 1, lines 4-6 and 10)."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dipguard.checks import check_int
from dipguard.decision import quality, sampled_steps
from dipguard.fit.decider import Decider
from dipguard.fit.module import StackedDIP
from dipguard.fit.record import Sample, StackRecord


class DecisionLogger(pl.Callback):
    """At each sampled step: the victim and SSIM on all B reconstructions in one batch, written to the record.

    The first of the three callbacks: it opens the record that the others read. Means over the stack go to the
    Trainer's loggers, at sampled steps only, since a logging call costs as much as a step.

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

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the record; read the given images' decisions."""
        module = as_stacked_dip(pl_module)
        self._steps = frozenset(sampled_steps(int(trainer.max_steps), decisions=self.decisions, every=self.every))
        module.record = StackRecord(
            given=module.given,
            given_scores=self.decider(module.given),
            indices=module.indices,
            K_max=self.K_max,
            keep_samples=self.keep_samples,
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample step t = ``batch_idx``, whose x(t) was made before this step's update."""
        if batch_idx not in self._steps:
            return
        start = time.perf_counter()
        module = as_stacked_dip(pl_module)
        record = open_record(module)
        x: Tensor = outputs["reconstructions"]
        sample = Sample(batch_idx, x, self.decider(x), quality(x, module.given), outputs["errors"])
        record.add_sample(sample)
        self._log(trainer, record, sample)
        self.seconds += time.perf_counter() - start

    def _log(self, trainer: pl.Trainer, record: StackRecord, sample: Sample) -> None:
        if not trainer.loggers:
            return
        moved = sample.scores.argmax(1) != record.given_scores.argmax(1)
        means = torch.stack([sample.errors.mean(), sample.quality.mean(), moved.double().mean().to(sample.errors)])
        error, value, share = means.tolist()
        found = sum(len(crossings) for crossings in record.crossings) / len(record.indices)
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


def open_record(module: StackedDIP) -> StackRecord:
    """The record that DecisionLogger opened.

    Raises:
        RuntimeError: There is none: the callbacks stand in the wrong order.
    """
    if module.record is None:
        raise RuntimeError(
            "`callbacks` must have DecisionLogger before BoundaryDetector and Stitcher, got no DecisionLogger"
        )
    return module.record
