"""Fits that are sampled without a victim, and the traces that a victim makes of them without another fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from dipguard.classifier import Decider
from dipguard.decision import DecisionTrace, crosses, localise, needed_for_replay, quality
from dipguard.fit.callbacks import as_stacked_dip, step_output
from dipguard.fit.options import DecideOptions, FitOptions, trace_settings
from dipguard.fit.runner import run_fit


@dataclass(frozen=True, eq=False)
class FitSamples:
    """Sampled steps of one image's fit."""

    steps: Tensor  # optimiser steps t, 0-based, increasing, [S] int64
    images: Tensor  # x(t), [S, 3, H, W] in (0, 1)
    quality: Tensor  # v(t) = SSIM(x(t), x0), [S]
    loss: Tensor  # the fit's error at t, [S]

    def covers(self, steps: Iterable[int]) -> bool:
        """Whether all these steps were sampled."""
        return set(steps) <= set(self.steps.tolist())

    def at(self, steps: Sequence[int]) -> FitSamples:
        """The samples at these steps, which must be increasing; ValueError if one was not sampled.

        x(t) depends neither on T nor on what else was sampled, so these are bit for bit the samples of a fit that was
        sampled at these steps only.
        """
        wanted = torch.tensor(list(steps), dtype=torch.int64, device="cpu")
        if len(wanted) == len(self.steps) and torch.equal(wanted, self.steps):
            return self
        if not self.covers(steps):
            absent = sorted(set(steps) - set(self.steps.tolist()))
            raise ValueError(f"`steps` must be among the sampled ones, got also {absent[:5]}")
        rows = torch.searchsorted(self.steps, wanted)
        return FitSamples(wanted, self.images[rows], self.quality[rows], self.loss[rows])


class _SampleKeeper(pl.Callback):
    """Copies x(t) at some steps to the CPU, with quality and loss."""

    def __init__(self, steps: Iterable[int]) -> None:
        self.steps = sorted(set(steps))
        self._place = {step: i for i, step in enumerate(self.steps)}
        self._images = torch.empty(0, dtype=torch.float32, device="cpu")
        self._scalars: list[tuple[Tensor, Tensor]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # One block for all samples, since there may be gigabytes of them.
        given = as_stacked_dip(pl_module).given
        self._images = torch.empty(len(given), len(self.steps), *given.shape[1:], dtype=given.dtype, device="cpu")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        step, x, errors = step_output(outputs)
        if step in self._place:
            self._images[:, self._place[step]].copy_(x)
            # A copy: the errors may lie in memory that an engine uses again at the next step.
            self._scalars.append((quality(x, as_stacked_dip(pl_module).given), errors.clone()))

    def samples(self) -> list[FitSamples]:
        if len(self._scalars) != len(self.steps):
            raise RuntimeError(
                f"the fit ended before the last step to keep, {self.steps[-1]}: {len(self._scalars)} of "
                f"{len(self.steps)} were sampled"
            )
        steps = torch.tensor(self.steps, dtype=torch.int64, device="cpu")
        values, losses = (torch.stack([pair[i] for pair in self._scalars], dim=1).cpu() for i in range(2))
        rows = zip(self._images, values, losses, strict=True)
        return [FitSamples(steps, images, value.clone(), loss.clone()) for images, value, loss in rows]


def fit_samples(
    images: Tensor, *, steps: Iterable[int], callbacks: Sequence[pl.Callback] = (), **run: Any
) -> tuple[list[FitSamples], dict[str, float]]:
    """Fit B networks to B images and keep x(t) at some steps; the fit is that of :func:`dipguard.fit.fit_stack`.

    ``steps`` are the optimiser steps to keep, at least one, from 0 to T-1; ``callbacks`` run after ours. The other
    arguments and errors are those of :func:`dipguard.fit.run_fit`. Returns the samples of each image, on the CPU, and
    the seconds of ``run_fit``; RuntimeError if the fit ended before the last of the steps.
    """
    keeper = _SampleKeeper(steps)
    seconds = run_fit(images, callbacks=[keeper, *callbacks], **run)
    return keeper.samples(), seconds


def decide_samples(
    fitted: FitSamples, *, given: Tensor, index: int, victim: Decider, fit: FitOptions, decide: DecideOptions
) -> DecisionTrace:
    """The trace that a fit with these decisions would have left, from a fit that was sampled at these steps at least.

    The victim sees the samples of one image as a batch; during a fit its batches hold all images at one or a few steps,
    so its logits may differ by rounding. Everything else is equal bit for bit, unless rounding changes a decision or
    the choice between two alphas.

    ``given`` is the given image x0, [3, H, W] in [0, 1]. A longer fit than the T of ``decide`` serves too. TypeError or
    ValueError for a bad victim, or steps that were not sampled.
    """
    seen = fitted.at(decide.steps)
    given = given.detach().to(device="cpu", dtype=seen.images.dtype, copy=True)
    scores = victim(seen.images).cpu()
    # Not alone: a batch of one takes other kernels, which round differently from those of a stack.
    given_scores = victim(torch.stack([given, seen.images[0]]))[0].cpu()
    decisions = scores.argmax(dim=1)
    at = torch.nonzero(crosses(decisions[:-1], decisions[1:])).flatten()
    at = at[needed_for_replay(seen.quality[at].double(), K_max=decide.K_max)]
    pairs = seen.images[at], seen.images[at + 1], scores[at], scores[at + 1]
    alpha, on_boundary = localise(*pairs, victim, N=decide.N, scores=decide.scores)
    return DecisionTrace(
        index=index,
        given=given,
        given_scores=given_scores,
        steps=seen.steps,
        scores=scores,
        quality=seen.quality,
        loss=seen.loss,
        crossing_at=at,
        alpha=alpha,
        on_boundary=on_boundary,
        last=seen.images[-decide.K_max :].clone(),
        settings=trace_settings(fit, decide),
    )
