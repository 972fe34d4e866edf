"""A callback that shows the victim windows of a fit, as they are and mirrored."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dipguard.checks import check_int
from dipguard.decision.evidence import SHIFTS, mirrored
from dipguard.fit.decider import Decider, ask_together, steps_together
from dipguard.fit.decision_logger import as_stacked_dip
from dipguard.fit.retire import Retirement


class EvidenceLogger(pl.Callback):
    """Means of x(t) over windows of steps, and how the victim reads each of them and its mirrored, shifted copy.

    The victim is asked when the windows since the last question make a good batch
    (:func:`~dipguard.fit.decider.steps_together`), and at the fit's end about the rest.

    Memory: ``windows`` images of each image, whatever T is.

    Args:
        victim: Takes [n, 3, H, W] in [0, 1], returns logits [n, C].
        warm_up: First step that counts, at least 0 (section 3.2's t0).
        every: Steps of a window, at least 1.
        windows: Number of windows S, at least 1.
        shifts: Of the mirrored copies, (dy, dx) in pixels, taken in turn.
        flip: See :func:`~dipguard.decision.evidence.mirrored`.

    Attributes:
        samples: [S, B, 3, H, W], after the fit.
        straight: The victim's logits on them, [S, B, C].
        turned: Its logits on their mirrored copies, [S, B, C].
        errors: Mean squared error to the given image, mean over each window, [S, B].
        seconds: Time spent here.

    Raises:
        TypeError, ValueError: An argument is out of range, or, when the fit starts, one that lets images go before its
            end (`Retirement`).
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
        self.shifts = shifts
        self.flip = flip
        self.seconds = 0.0
        self.samples = self.errors = torch.empty(0)
        self._straight: list[Tensor] = []
        self._turned: list[Tensor] = []
        self._unread = range(0)

    @property
    def straight(self) -> Tensor:
        """Logits on the windows, [S, B, C]."""
        return torch.stack(self._straight)

    @property
    def turned(self) -> Tensor:
        """Logits on their mirrored, shifted copies, [S, B, C]."""
        return torch.stack(self._turned)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make room; refuse anything but a StackedDIP all of whose images are fitted to the end."""
        module = as_stacked_dip(pl_module)
        if any(isinstance(callback, Retirement) for callback in getattr(trainer, "callbacks", ())):
            raise ValueError("the evidence needs every image to the fit's end, got a fit that retires images")
        given = module.given
        self.samples = given.new_zeros(self.windows, *given.shape)
        self.errors = given.new_zeros(self.windows, len(given))
        self._straight, self._turned = [], []
        self._unread = range(0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add x(t), t = ``batch_idx``, to its window; ask the victim once enough windows are full."""
        window, place = divmod(batch_idx - self.warm_up, self.every)
        if not 0 <= window < self.windows:
            return
        self.samples[window] += outputs["reconstructions"]
        self.errors[window] += outputs["errors"]
        if place == self.every - 1:
            start = time.perf_counter()
            self.samples[window] /= self.every
            self.errors[window] /= self.every
            self._unread = range(self._unread.start, window + 1)
            if len(self._unread) >= steps_together(2 * self.samples.shape[1]):
                self._ask()
            self.seconds += time.perf_counter() - start

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask about the windows that still wait."""
        start = time.perf_counter()
        self._ask()
        self.seconds += time.perf_counter() - start

    def _ask(self) -> None:
        windows = self._unread
        if not windows:
            return
        for logits in ask_together(self._decide, [self._both(window) for window in windows]):
            straight, turned = logits.chunk(2)
            self._straight.append(straight)
            self._turned.append(turned)
        self._unread = range(windows.stop, windows.stop)

    def _both(self, window: int) -> Tensor:
        shift = self.shifts[window % len(self.shifts)]
        return torch.cat([self.samples[window], mirrored(self.samples[window], shift=shift, flip=self.flip)])
