"""When to stop a deep image prior: rules that watch x(t) step by step and choose one reconstruction of each image.

No rule asks a victim. State is kept image by image, so that no image's choice depends on its neighbours in a stack.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from dipguard.checks import check_float, check_int

TILE = 32
LEAST_ERROR = 1e-20
"""Mean squared error that counts as none: 200 dB."""


class Stopped(NamedTuple):
    """What a rule chose."""

    images: Tensor  # x(t) at each image's own t, [B, 3, H, W]
    steps: Tensor  # that t, [B] int64


class StopRule(ABC):
    """Chooses one step for each image of one stack during one fit; a second fit needs a new rule.

    The constructors of the rules raise TypeError or ValueError for an argument that is out of range.
    """

    def __init__(self) -> None:
        self._count = 0
        self._chosen: Stopped | None = None

    def update(self, t: int, reconstructions: Tensor, given: Tensor) -> None:
        """See x(t), [B, 3, H, W] in [0, 1], of the images ``given``; t is 0, 1, 2, ... What is kept is copied.

        ValueError if a step was left out or repeated.
        """
        if t != self._count:
            raise ValueError(f"`t` must be {self._count}, the next step of this rule's one fit, got {t}")
        # Tensors made in inference mode could not be updated outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._watch(t, reconstructions.detach(), given.detach())
        self._count += 1

    def result(self) -> Stopped:
        """The choice so far; RuntimeError if there is none yet."""
        if self._chosen is None:
            raise RuntimeError(f"{type(self).__name__} chose none of the {self._count} steps that it saw")
        return self._chosen

    def steps_needed(self, T: int) -> int:
        """How many of T steps the rule has to see."""
        return T

    @abstractmethod
    def _watch(self, t: int, x: Tensor, given: Tensor) -> None:
        """See x(t), which is the caller's."""

    def _take(self, chosen: Tensor, t: int, x: Tensor) -> None:
        """Let x(t) be the choice for the images that ``chosen``, [B] bool, names; for all of them at first."""
        images, steps = self._chosen or (x, torch.full_like(chosen, t, dtype=torch.int64))
        self._chosen = Stopped(torch.where(chosen[:, None, None, None], x, images), torch.where(chosen, t, steps))


def tile_psnr(images: Tensor, given: Tensor, *, tile: int = TILE) -> Tensor:
    """Smallest PSNR over the tiles of an image, against the given one (Dai et al. 2020).

    Tiles of ``tile`` pixels a side start at the upper left; what is left over counts for nothing, as in the ports of
    the authors' script, and a side shorter than ``tile`` is one tile. ``images`` and ``given`` are [B, 3, H, W] in [0,
    1]; returns [B] float64, in dB, at most 200.
    """
    height, width = (min(tile, side) for side in images.shape[-2:])
    rows, columns = images.shape[-2] // height, images.shape[-1] // width
    errors = (images - given)[..., : rows * height, : columns * width].double().square()
    tiles = errors.unflatten(3, (columns, width)).unflatten(2, (rows, height))
    worst = tiles.mean(dim=(1, 3, 5)).flatten(1).amax(dim=1)
    return -10 * torch.log10(worst.clamp_min(LEAST_ERROR))


class PeakOfSmoothedPSNR(StopRule):
    """DIPDefend's rule (Dai et al. 2020): the reconstruction at the peak of the smoothed PSNR to the given image.

    Double exponential smoothing of p(t), the smallest PSNR over tiles (`tile_psnr`): s(0) = p(0), b(0) = p(1) - p(0),
    s(t) = l p(t) + (1 - l) (s(t-1) + b(t-1)), b(t) = l (s(t) - s(t-1)) + (1 - l) b(t-1). The peak is the highest s of
    the whole fit, the first among equals. Where s never rises above s(0), the newest reconstruction is the choice.

    Args:
        smoothing: l, in [0, 1]; the authors' is 0.002.
        tile: Side of a tile, pixels; the authors' is 32.
    """

    def __init__(self, *, smoothing: float = 0.002, tile: int = TILE) -> None:
        super().__init__()
        self.smoothing = check_float(smoothing, name="smoothing", low=0.0, high=1.0)
        self.tile = check_int(tile, name="tile", low=1)

    def _watch(self, t: int, x: Tensor, given: Tensor) -> None:
        p = tile_psnr(x, given, tile=self.tile)
        if t == 0:
            self._level = self._peak = p
            self._risen = torch.zeros_like(p, dtype=torch.bool)
        else:
            if t == 1:
                self._trend = p - self._level
            level = self.smoothing * p + (1 - self.smoothing) * (self._level + self._trend)
            self._trend = self.smoothing * (level - self._level) + (1 - self.smoothing) * self._trend
            self._level = level
        higher = self._level > self._peak
        self._risen = self._risen | higher
        self._take(higher | ~self._risen, t, x)
        self._peak = torch.maximum(self._peak, self._level)


class FixedStep(StopRule):
    """The same step, at least 0, for every image (Kattamis et al. 2019; Sutanto and Lee 2020)."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = check_int(step, name="step", low=0)

    def steps_needed(self, T: int) -> int:
        """All up to the step itself."""
        return min(T, self.step + 1)

    def _watch(self, t: int, x: Tensor, given: Tensor) -> None:
        if t == self.step:
            self._take(torch.ones(len(x), dtype=torch.bool, device=x.device), t, x)
