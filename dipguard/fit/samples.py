"""A fit that asks no victim: what it leaves serves every victim, every number of decisions and every shorter T."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from dipguard.decision import quality
from dipguard.fit.decision_logger import as_stacked_dip
from dipguard.fit.module import FitOptions, StackedDIP
from dipguard.fit.runner import apart, make_trainer


@dataclass(frozen=True, eq=False)
class FitSamples:
    """One image's fit, seen at some steps.

    Attributes:
        steps: Optimiser steps t, 0-based, increasing, [S] int64.
        images: x(t), [S, 3, H, W] in (0, 1).
        quality: v(t) = SSIM(x(t), x0), [S].
        loss: The fit's mean squared error at t, [S].
    """

    steps: Tensor
    images: Tensor
    quality: Tensor
    loss: Tensor

    def covers(self, steps: Iterable[int]) -> bool:
        """Whether all these steps were sampled."""
        return set(steps) <= set(self.steps.tolist())

    def at(self, steps: Sequence[int]) -> FitSamples:
        """The same fit seen at these steps alone, which must be increasing.

        x(t) depends on neither T nor on what else was sampled, so this is the fit that would have been sampled at these
        steps, number by number.

        Raises:
            ValueError: A step was not sampled.
        """
        wanted = torch.tensor(list(steps), dtype=torch.int64)
        if len(wanted) == len(self.steps) and torch.equal(wanted, self.steps):
            return self
        if not self.covers(steps):
            absent = sorted(set(steps) - set(self.steps.tolist()))
            raise ValueError(f"`steps` must be among the sampled ones, got {absent[:5]} beside them")
        rows = torch.searchsorted(self.steps, wanted)
        return FitSamples(wanted, self.images[rows], self.quality[rows], self.loss[rows])


class SampleKeeper(pl.Callback):
    """Copies x(t) of the named steps to the CPU, with quality and loss.

    Args:
        steps: Optimiser steps, below the Trainer's ``max_steps``.

    Attributes:
        seconds: Time spent here.
    """

    def __init__(self, steps: Iterable[int]) -> None:
        self.steps = sorted(set(steps))
        self.seconds = 0.0
        self._place = {step: i for i, step in enumerate(self.steps)}
        self._images = torch.empty(0)
        self._scalars: list[tuple[Tensor, Tensor]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make room: one block for all samples, since there may be gigabytes of them."""
        given = as_stacked_dip(pl_module).given
        self._images = torch.empty(len(given), len(self.steps), *given.shape[1:], dtype=given.dtype)
        self._scalars = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep step t = ``batch_idx``, whose x(t) was made before this step's update."""
        place = self._place.get(batch_idx)
        if place is None:
            return
        start = time.perf_counter()
        with torch.no_grad():
            x: Tensor = outputs["reconstructions"].detach()
            self._images[:, place].copy_(x)
            # A copy: the errors may lie in memory that an engine uses again at the next step.
            self._scalars.append((quality(x, as_stacked_dip(pl_module).given), outputs["errors"].detach().clone()))
        self.seconds += time.perf_counter() - start

    def samples(self) -> list[FitSamples]:
        """What was seen, one an image.

        Raises:
            RuntimeError: The fit ended before the last of the steps.
        """
        if len(self._scalars) != len(self.steps):
            raise RuntimeError(f"{len(self._scalars)} of {len(self.steps)} steps were seen")
        if not self.steps:
            return []
        steps = torch.tensor(self.steps, dtype=torch.int64)
        values, losses = (torch.stack([pair[i] for pair in self._scalars], dim=1).cpu() for i in range(2))
        rows = zip(self._images, values, losses, strict=True)
        return [FitSamples(steps, images, value.clone(), loss.clone()) for images, value, loss in rows]


def fit_samples(
    images: Tensor,
    *,
    steps: Iterable[int],
    T: int,
    indices: Sequence[int],
    fit: FitOptions,
    device: torch.device,
    callbacks: Sequence[pl.Callback] = (),
) -> tuple[list[FitSamples], dict[str, float]]:
    """Fit B networks to B images, as :func:`dipguard.fit.fit_stack` does, and keep what they show at some steps.

    Args:
        images: x0, [B, 3, H, W] in [0, 1].
        steps: Optimiser steps to keep, from 0 to T-1; none where only ``callbacks`` look on.
        T: Optimiser steps.
        indices: The images' indices.
        fit: How to fit.
        device: Where to fit.
        callbacks: More callbacks, run after ours.

    Returns:
        One sampled fit an image, on the CPU, and seconds: ``start`` (up to the Trainer's own start), ``fit``.

    Raises:
        TypeError, ValueError: Bad images or options.
        RuntimeError: A step lies beyond T.
    """
    start = time.perf_counter()
    keeper = SampleKeeper(steps)
    with apart(device):
        module = StackedDIP(images, indices=indices, options=fit)
        trainer = make_trainer(T, device=device, callbacks=[keeper, *callbacks], logger=None)
        began = time.perf_counter()
        trainer.fit(module)
    return keeper.samples(), {"start": began - start, "fit": time.perf_counter() - began}
