"""A stopping rule on a stacked fit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor

from dipguard.decision.stopping import Stopped, StopRule
from dipguard.fit.callbacks import as_stacked_dip, step_output
from dipguard.fit.module import StackedDIP
from dipguard.fit.options import FitOptions
from dipguard.fit.runner import isolated_trainer, make_trainer

ASK_EVERY = 50
"""Steps between two checks whether the rule is done: on a GPU each of them waits for the step to end."""


class StopRuleCallback(pl.Callback):
    """Shows every step of a fit to a stopping rule.

    It does not change the fit, except that it may end it: with our other callbacks in the same Trainer and
    ``end_fit=False``, all results are the same as without it.

    Args:
        rule: A fresh rule.
        end_fit: End the fit when the rule is done.

    Attributes:
        stopped: What the rule chose, after the fit; None before.
        seconds: Time spent here.
    """

    def __init__(self, rule: StopRule, *, end_fit: bool = True) -> None:
        self.rule = rule
        self.end_fit = end_fit
        self.stopped: Stopped | None = None
        self.seconds = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse any module but a StackedDIP."""
        as_stacked_dip(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show x(t), which was made before this step's update, to the rule."""
        start = time.perf_counter()
        step, x, _ = step_output(outputs)
        self.rule.update(step, x, as_stacked_dip(pl_module).given)
        if self.end_fit and (step + 1) % ASK_EVERY == 0 and self.rule.done:
            trainer.should_stop = True
        self.seconds += time.perf_counter() - start

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collect what the rule chose."""
        self.stopped = self.rule.result()


def fit_rule(
    images: Tensor,
    *,
    rule: StopRule,
    indices: Sequence[int],
    fit: FitOptions,
    T: int,
    device: torch.device,
    callbacks: Sequence[pl.Callback] = (),
    logger: Logger | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> Stopped:
    """Fit B networks to B images for a stopping rule alone, and no longer than it needs.

    The fit is that of :func:`dipguard.fit.fit_stack`, with the same x(t), but without a victim. It may be called under
    no_grad or inference_mode and inside another Trainer's loop.

    Args:
        images: x0, [B, 3, H, W] in [0, 1].
        rule: A fresh rule.
        indices: The images' indices.
        fit: How to fit.
        T: Optimiser steps.
        device: Where to fit.
        callbacks: Further callbacks, run after the rule's.
        logger: A Lightning logger for them.
        trainer: Further keyword arguments of ``pl.Trainer``; see :func:`dipguard.fit.make_trainer`.

    Returns:
        What the rule chose, on ``device`` and in the fit's dtype.

    Raises:
        TypeError, ValueError: Bad images or options.
        RuntimeError: The rule waits for a step beyond T.
    """
    watch = StopRuleCallback(rule)
    with isolated_trainer(device):
        module = StackedDIP(images, indices=indices, options=fit)
        every = [watch, *callbacks]
        made = make_trainer(rule.steps_needed(T), device=device, callbacks=every, logger=logger, trainer=trainer)
        made.fit(module)
    assert watch.stopped is not None
    return watch.stopped
