"""Progress of many stacked fits as one bar with the time left."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from tqdm import tqdm

from dipguard.fit.decision_logger import as_stacked_dip


class FitProgress(pl.Callback):
    """Advances a bar that counts image-steps, so that stacks of different sizes weigh what they cost.

    Steps that an image is spared, because it has left the stack, are taken off the bar's total.

    Args:
        bar: A tqdm bar whose total is images x T.
        images: Images of this stack.
        every: Steps between two updates.
        slots: How many of them are fitted at once; None: all.
    """

    def __init__(self, bar: tqdm[Any], *, images: int, every: int = 10, slots: int | None = None) -> None:
        self.bar = bar
        self.images = images
        self.slots = images if slots is None else slots
        self.every = every
        self._fitted = images
        self._seen_spared = 0
        self._waiting = 0
        self._reported = 0
        self._spared = 0
        self._planned = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One stack may be fitted several times, with another network each."""
        module = as_stacked_dip(pl_module)
        self._planned += self.images * module.T
        self._fitted, self._seen_spared = len(module.indices), 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report the image-steps done since the last report."""
        done = batch_idx + 1
        self._waiting += self._fitted
        module = as_stacked_dip(pl_module)
        self._spare(module.spared - self._seen_spared)
        self._fitted, self._seen_spared = len(module.indices), module.spared
        if done % self.every == 0:
            self._report()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the rest."""
        self._report()
        self._spare(self._planned - self._reported - self._spared)

    def finish(self, T: int) -> None:
        """Take off the bar what of a stack's T steps was not fitted, because it was known already."""
        self._spare(max(0, self.images * T - self._reported - self._spared))

    def roll_back(self) -> None:
        """Take everything back: the stack is fitted again from its start."""
        self._spare(-self._spared)
        self.bar.update(-self._reported)
        self._fitted, self._waiting, self._reported, self._planned = self.images, 0, 0, 0

    def _report(self) -> None:
        self.bar.update(self._waiting)
        self._reported += self._waiting
        self._waiting = 0

    def _spare(self, steps: int) -> None:
        if steps and self.bar.total is not None:
            self.bar.total -= steps
            self._spared += steps


def progress_bar(*, images: int, T: int, show: bool) -> tqdm[Any]:
    """A bar over images x T image-steps; silent when ``show`` is false."""
    return tqdm(total=images * T, desc="fit", unit="step", unit_scale=True, disable=not show, dynamic_ncols=True)
