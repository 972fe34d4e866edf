"""Progress of many stacked fits as one bar with the time left."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from tqdm import tqdm


class FitProgress(pl.Callback):
    """Advances a bar that counts image-steps, so that stacks of different sizes weigh what they cost.

    Args:
        bar: A tqdm bar whose total is images x T.
        images: Images of this stack.
        every: Steps between two updates.
    """

    def __init__(self, bar: tqdm[Any], *, images: int, every: int = 10) -> None:
        self.bar = bar
        self.images = images
        self.every = every
        self._reported = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report the steps done since the last report."""
        done = batch_idx + 1
        if done % self.every == 0 or done == trainer.max_steps:
            self.bar.update((done - self._reported) * self.images)
            self._reported = done


def progress_bar(*, images: int, T: int, show: bool) -> tqdm[Any]:
    """A bar over images x T image-steps; silent when ``show`` is false."""
    return tqdm(total=images * T, desc="fit", unit="step", unit_scale=True, disable=not show, dynamic_ncols=True)
