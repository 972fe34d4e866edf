"""Means over windows of steps, and how the victim reads them and their mirrored copies."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dipguard.checks import check_bool, check_int
from dipguard.classifier import Decider, ask_together, steps_together
from dipguard.decision import quality
from dipguard.decision.class_scores import clipped, mirrored
from dipguard.fit.callbacks import as_stacked_dip, counted, step_output


class WindowLogger(pl.Callback):
    """Means of x(t) over windows of steps, and the victim's logits on each and on its mirrored, shifted copy.

    The victim is asked when enough windows for a good batch are full, and at the end of the fit about the rest. Then
    means over the stack go to the Trainer's loggers, at each window's last step: ``fit/mse``, ``fit/quality`` (SSIM)
    and, with ``given_logits``, ``fit/decision_changed`` (share of the images whose decision differs from that on x0).
    TypeError or ValueError if an argument is out of range, or the module is no StackedDIP; RuntimeError if the fit ends
    before the last window.

    Args:
        victim: Takes [n, 3, H, W] in [0, 1], returns logits [n, C].
        warm_up: First step that counts, at least 0 (section 3.2's t0).
        every: Steps of a window, at least 1.
        windows: Number of windows S, at least 1.
        flip: Mirror the copies; False only moves them.
        distances: No value of a window's mean is further than this from the given image's, [B], at least 0, in units of
            the images, which are in [0, 1] (:func:`~dipguard.decision.class_scores.clipped`); None leaves them as they
            are.
        given_logits: The victim's logits on the given images, [B, C].
        first_step: Added to the step numbers of log entries, for several fits in one log.

    Attributes:
        samples: Means over the windows, clipped, [S, B, 3, H, W], after the fit.
        errors: The fit's error (mean square of what exceeds the dead zone), mean over each window, [S, B].
        quality: SSIM of each window to the given image, [S, B].
        logits, mirrored_logits: The victim's logits on the windows and on their mirrored copies, [S, B, C] each.
        seconds: Time spent here.
    """

    def __init__(
        self,
        victim: nn.Module,
        *,
        warm_up: int,
        every: int,
        windows: int,
        flip: bool = True,
        distances: Tensor | None = None,
        given_logits: Tensor | None = None,
        first_step: int = 0,
    ) -> None:
        self._decide = Decider(victim)
        self.warm_up = check_int(warm_up, name="warm_up", low=0)
        self.every = check_int(every, name="every", low=1)
        self.windows = check_int(windows, name="windows", low=1)
        self.flip = check_bool(flip, name="flip")
        self.distances, self.given_logits, self.first_step = distances, given_logits, first_step
        self.seconds = 0.0
        self.samples = self.errors = self.quality = self.logits = self.mirrored_logits = torch.empty(0, device="cpu")
        self._logits: list[tuple[Tensor, Tensor]] = []  # of each window that was read, and of its mirrored copy
        self._full = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Allocate the windows."""
        given = as_stacked_dip(pl_module).given
        self.samples = given.new_zeros(self.windows, *given.shape)
        self.errors, self.quality = given.new_zeros(2, self.windows, len(given))
        self._logits, self._full, self.seconds = [], 0, 0.0

    @counted
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
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
            if self.distances is not None:
                given = as_stacked_dip(pl_module).given
                self.samples[window] = clipped(self.samples[window], given, distances=self.distances)
            self._full = window + 1
            if self._full - len(self._logits) >= steps_together(2 * self.samples.shape[1]):
                self._ask(trainer, as_stacked_dip(pl_module).given)

    @counted
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask about the remaining windows."""
        self._ask(trainer, as_stacked_dip(pl_module).given)
        if self._full < self.windows:
            needed = self.warm_up + self.windows * self.every
            raise RuntimeError(
                f"the fit ended after {as_stacked_dip(pl_module).step} steps, before the last of {self.windows} "
                f"windows, which needs {needed}"
            )
        self.logits, self.mirrored_logits = (torch.stack(logits) for logits in zip(*self._logits, strict=True))

    def _ask(self, trainer: pl.Trainer, given: Tensor) -> None:
        first = len(self._logits)
        parts = [torch.cat([window, mirrored(window, flip=self.flip)]) for window in self.samples[first : self._full]]
        for window, both in enumerate(ask_together(self._decide, parts) if parts else (), first):
            logits, mirrored_logits = both.chunk(2)
            self._logits.append((logits, mirrored_logits))
            self.quality[window] = quality(self.samples[window], given)
            for logger in trainer.loggers:
                row = {"fit/mse": self.errors[window].mean(), "fit/quality": self.quality[window].mean()}
                if self.given_logits is not None:
                    given_class = self.given_logits.argmax(1).to(logits.device)
                    row["fit/decision_changed"] = (logits.argmax(1) != given_class).float().mean()
                step = self.first_step + self.warm_up + self.every * (window + 1) - 1
                logger.log_metrics({name: float(value) for name, value in row.items()}, step=step)
