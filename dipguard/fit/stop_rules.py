"""Stopping rules on a stacked fit: as riders on somebody's fit, or on one of their own."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from dipguard.decision.stopping import Stopped, StopRule
from dipguard.fit.decision_logger import as_stacked_dip
from dipguard.fit.module import FitOptions, StackedDIP
from dipguard.fit.retire import Retirement
from dipguard.fit.runner import apart, make_trainer

ASK_EVERY = 50
"""Steps between two questions whether all rules are done: on a GPU an answer waits for the step to end."""


class StopRules(pl.Callback):
    """Feeds any number of rules with every step of one fit, so that one fit serves them all.

    It only looks on: with DIPGuard's callbacks in the same Trainer, all results are what they are without it.

    Args:
        rules: A fresh rule for each name.
        end_fit: End the fit when all rules are done; never for riders on a fit that others still need.
        until: Steps that the rules see of a longer fit; None shows them all.

    Attributes:
        stopped: What each rule chose, by name, after the fit.
        seconds: Time spent here.

    Raises:
        ValueError: No rules, or, when the fit starts, one that lets images go before its end (`Retirement`).
    """

    def __init__(self, rules: Mapping[str, StopRule], *, end_fit: bool = False, until: int | None = None) -> None:
        if not rules:
            raise ValueError("`rules` must hold at least one rule, got none")
        self.rules = dict(rules)
        self.end_fit = end_fit
        self.until = until
        self.stopped: dict[str, Stopped] = {}
        self.seconds = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to start on anything but a StackedDIP all of whose images are fitted to the end."""
        as_stacked_dip(pl_module)
        if any(isinstance(callback, Retirement) for callback in getattr(trainer, "callbacks", ())):
            raise ValueError(
                "`rules` must see every image to the fit's end, got a fit that retires images (`patience`)"
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show step t = ``batch_idx``, whose x(t) was made before this step's update, to all rules."""
        if self.until is not None and batch_idx >= self.until:
            return
        start = time.perf_counter()
        given = as_stacked_dip(pl_module).given
        for rule in self.rules.values():
            rule.update(batch_idx, outputs["reconstructions"], given)
        if self.end_fit and (batch_idx + 1) % ASK_EVERY == 0 and all(rule.done for rule in self.rules.values()):
            trainer.should_stop = True
        self.seconds += time.perf_counter() - start

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collect what the rules chose."""
        self.stopped = {name: rule.result() for name, rule in self.rules.items()}


def fit_rules(
    images: Tensor,
    *,
    rules: Mapping[str, StopRule],
    indices: Sequence[int],
    fit: FitOptions,
    T: int,
    device: torch.device,
    callbacks: Sequence[pl.Callback] = (),
) -> dict[str, Stopped]:
    """Fit B networks to B images for the rules alone: no victim, no decisions, no steps after the last one needed.

    May be called under no_grad or inference_mode and inside another Trainer's loop, as
    :func:`dipguard.fit.fit_stack`, whose fit it shares: same options, same x(t).

    Args:
        images: x0, [B, 3, H, W] in [0, 1].
        rules: A fresh rule for each name.
        indices: The images' indices.
        fit: How to fit.
        T: Optimiser steps.
        device: Where to fit.
        callbacks: More callbacks, run after the rules.

    Returns:
        What each rule chose, on ``device`` and in the fit's dtype.

    Raises:
        TypeError, ValueError: Bad images or options.
        RuntimeError: A rule waits for a step beyond T.
    """
    watch = StopRules(rules, end_fit=True)
    steps = max(rule.steps_needed(T) for rule in rules.values())
    with apart(device):
        module = StackedDIP(images, indices=indices, options=fit)
        make_trainer(steps, device=device, callbacks=[watch, *callbacks], logger=None).fit(module)
    return watch.stopped
