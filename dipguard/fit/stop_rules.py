"""A stopping rule on a stacked fit."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from dipguard.decision import quality
from dipguard.decision.stopping import StopRule
from dipguard.fit.callbacks import as_stacked_dip, step_output, tell_epoch


class StopRuleCallback(pl.Callback):
    """Shows every step of a fit to a fresh stopping rule, whose ``result`` is there afterwards; changes nothing else.

    The Trainer's loggers get ``fit/mse`` and ``fit/quality`` (SSIM), means over the stack, at about 50 steps, to whose
    numbers ``first_step`` is added; ``trainer.callback_metrics`` get them at the last step of each epoch.
    """

    def __init__(self, rule: StopRule, *, first_step: int = 0) -> None:
        self.rule, self.first_step = rule, first_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """Show x(t), which was made before this step's update, to the rule."""
        given = as_stacked_dip(pl_module).given
        step, x, errors = step_output(outputs)
        tell_epoch(trainer, x, given, errors)
        self.rule.update(step, x, given)
        if trainer.loggers and (step + 1) % max(1, trainer.max_steps // 50) == 0:
            means = {"fit/mse": float(errors.mean()), "fit/quality": float(quality(x, given).mean())}
            for logger in trainer.loggers:
                logger.log_metrics(means, step=self.first_step + step)
