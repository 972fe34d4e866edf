"""Means over windows of steps, and how the victim reads them and their mirrored copies."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dipguard.checks import check_int
from dipguard.classifier import Decider, ask_together, steps_together
from dipguard.decision.class_scores import SHIFTS, mirrored
from dipguard.fit.callbacks import as_stacked_dip, counted, step_output


class WindowLogger(pl.Callback):
    """Means of x(t) over windows of steps, and the victim's logits on each and on its mirrored, shifted copy.

    The victim is asked when enough windows for a good batch are full, and at the end of the fit about the rest.

    Args:
        victim: Takes [n, 3, H, W] in [0, 1], returns logits [n, C].
        warm_up: First step that counts, at least 0 (section 3.2's t0).
        every: Steps of a window, at least 1.
        windows: Number of windows S, at least 1.
        shifts: Of the mirrored copies, (dy, dx) in pixels, taken in turn.
        flip: Mirror the copies; False only moves them.

    Attributes:
        samples: Means over the windows, [S, B, 3, H, W], after the fit.
        logits: The victim's logits on them, [S, B, C].
        mirrored_logits: Its logits on their mirrored copies, [S, B, C].
        errors: Mean squared error to the given image, mean over each window, [S, B].
        seconds: Time spent here.

    Raises:
        TypeError, ValueError: An argument is out of range, or the module is no StackedDIP.
        RuntimeError: The fit ended before the last window.
    """

    def __init__(
        self,
        victim: nn.Module,
        *,
        warm_up: int,
        every: int,
        windows: int,
        shifts: tuple[tuple[int, int], ...] = SHIFTS,
        flip: bool = True,
    ) -> None:
        self._decide = Decider(victim)
        self.warm_up = check_int(warm_up, name="warm_up", low=0)
        self.every = check_int(every, name="every", low=1)
        self.windows = check_int(windows, name="windows", low=1)
        self.shifts, self.flip = shifts, flip
        self.seconds = 0.0
        self.samples = self.errors = torch.empty(0, dtype=torch.float32)
        self._logits: list[Tensor] = []
        self._mirrored: list[Tensor] = []
        self._unread = range(0)

    @property
    def logits(self) -> Tensor:
        """Logits on the windows, [S, B, C]."""
        return torch.stack(self._logits)

    @property
    def mirrored_logits(self) -> Tensor:
        """Logits on their mirrored, shifted copies, [S, B, C]."""
        return torch.stack(self._mirrored)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Allocate the windows."""
        given = as_stacked_dip(pl_module).given
        self.samples = given.new_zeros(self.windows, *given.shape)
        self.errors = given.new_zeros(self.windows, len(given))
        self._logits, self._mirrored = [], []
        self._unread = range(0)

    @counted
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add x(t) to its window; ask the victim once enough windows are full."""
        step, x, errors = step_output(outputs)
        window, place = divmod(step - self.warm_up, self.every)
        if not 0 <= window < self.windows:
            return
        self.samples[window] += x
        self.errors[window] += errors
        if place == self.every - 1:
            self.samples[window] /= self.every
            self.errors[window] /= self.every
            self._unread = range(self._unread.start, window + 1)
            if len(self._unread) >= steps_together(2 * self.samples.shape[1]):
                self._ask()

    @counted
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask about the remaining windows."""
        self._ask()
        if len(self._logits) < self.windows:
            needed = self.warm_up + self.windows * self.every
            raise RuntimeError(
                f"the fit ended after {as_stacked_dip(pl_module).step} steps, before the last of {self.windows} "
                f"windows, which needs {needed}"
            )

    def _ask(self) -> None:
        windows = self._unread
        if not windows:
            return
        for both in ask_together(self._decide, [self._with_mirrored(window) for window in windows]):
            logits, mirrored_logits = both.chunk(2)
            self._logits.append(logits)
            self._mirrored.append(mirrored_logits)
        self._unread = range(windows.stop, windows.stop)

    def _with_mirrored(self, window: int) -> Tensor:
        shift = self.shifts[window % len(self.shifts)]
        return torch.cat([self.samples[window], mirrored(self.samples[window], shift=shift, flip=self.flip)])
