"""Fixed transforms of the image, what a user would try first: JPEG, median filter, total variation, bit depth.

None has anything to learn, so none needs weights. All have fallen to attacks that know them; each class says to which.
"""

from __future__ import annotations

import io
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from dipguard.checks import check_choice, check_float, check_int
from dipguard.defenses.base import Purifier, library

SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")


def to_hwc(image: Tensor) -> np.ndarray:
    """[3, H, W] of any float type -> [H, W, 3] float32, as image libraries take it."""
    return image.float().cpu().permute(1, 2, 0).contiguous().numpy()


def from_hwc(pixels: np.ndarray, like: Tensor) -> Tensor:
    """[H, W, 3] in [0, 1] -> [3, H, W] of the dtype and on the device of ``like``, clamped to [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).to(like).clamp(0, 1)


def jpeg_round_trip(pixels: np.ndarray, *, quality: int, subsampling: str, defense: str) -> np.ndarray:
    """Compress [H, W, 3] in [0, 1], rounded to 8 bits, with Pillow's JPEG; return what it decodes to, in [0, 1]."""
    pil = library("PIL.Image", defense=defense)
    file = io.BytesIO()
    levels = np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    pil.fromarray(levels).save(file, format="JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(pil.open(file), dtype=np.float32) / 255


class JPEG(Purifier):
    """JPEG compression (Dziugaite et al. 2016; Das et al. 2017; Guo et al. 2018, whose quality 75 is the default).

    Broken by Athalye et al. 2018 (BPDA).

    Args:
        victim: as in `Purifier`.
        quality: of Pillow's scale, 1 to 100.
        subsampling: of the chroma: ``4:4:4``, ``4:2:2`` or ``4:2:0`` (Pillow's default).
        seed: as in `Purifier`; nothing is drawn.
    """

    name: ClassVar[str] = "jpeg"

    def __init__(self, victim: nn.Module, *, quality: int = 75, subsampling: str = "4:2:0", seed: int = 0) -> None:
        super().__init__(victim, seed=seed)
        self.quality = check_int(quality, name="quality", low=1, high=100)
        self.subsampling = check_choice(subsampling, SUBSAMPLINGS, name="subsampling")
        self._version = str(library("PIL", defense=self.name).__version__)

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Purifier`, with quality, subsampling and Pillow's version."""
        own = {"quality": self.quality, "subsampling": self.subsampling}
        return {**super().settings, **own, "versions": {"pillow": self._version}}

    def purify_one(self, image: Tensor, index: int) -> Tensor:
        """Compress and decode."""
        pixels = jpeg_round_trip(to_hwc(image), quality=self.quality, subsampling=self.subsampling, defense=self.name)
        return from_hwc(pixels, image)


class Median(Purifier):
    """Median filter, channel by channel (Xu et al. 2018, feature squeezing), with SciPy; mirrored at the border.

    Broken by He et al. 2017, who attacked feature squeezing with an adaptive attack.

    Args:
        victim: as in `Purifier`.
        size: side of the square window, pixels, at least 2. Xu et al. took 2 for CIFAR-10 and ImageNet; an even window
            reaches one pixel further up and left, and takes the upper of the two middle values.
        seed: as in `Purifier`; nothing is drawn.
    """

    name: ClassVar[str] = "median"

    def __init__(self, victim: nn.Module, *, size: int = 3, seed: int = 0) -> None:
        super().__init__(victim, seed=seed)
        self.size = check_int(size, name="size", low=2)
        self._version = str(library("scipy", defense=self.name).__version__)

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Purifier`, with the window and SciPy's version."""
        return {**super().settings, "size": self.size, "versions": {"scipy": self._version}}

    def purify_one(self, image: Tensor, index: int) -> Tensor:
        """Filter each channel."""
        filters = library("scipy.ndimage", defense=self.name)
        return from_hwc(filters.median_filter(to_hwc(image), size=(self.size, self.size, 1), mode="reflect"), image)


class TotalVariation(Purifier):
    """Total-variation denoising (Rudin et al. 1992) by Chambolle's algorithm (2004), channel by channel.

    Guo et al. 2018 defend with total variation after dropping random pixels; nothing is dropped here. Theirs was broken
    by Athalye et al. 2018 (BPDA and EOT).

    Args:
        victim: as in `Purifier`.
        weight: of the total variation against half the squared distance to the image, above 0; more is smoother.
        eps: the iteration stops where the energy changes by less than this share of its first value. scikit-image's
            default, taken here, stops well before the minimum.
        steps: the most iterations.
        seed: as in `Purifier`; nothing is drawn.
    """

    name: ClassVar[str] = "total_variation"

    def __init__(
        self, victim: nn.Module, *, weight: float = 0.1, eps: float = 2e-4, steps: int = 200, seed: int = 0
    ) -> None:
        super().__init__(victim, seed=seed)
        self.weight = check_float(weight, name="weight", low=0)
        if self.weight == 0:
            raise ValueError("`weight` must be above 0, got 0")
        self.eps = check_float(eps, name="eps", low=0)
        self.steps = check_int(steps, name="steps", low=1)
        self._version = str(library("skimage", defense=self.name).__version__)

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Purifier`, with weight, stopping rule and scikit-image's version."""
        own = {"weight": self.weight, "eps": self.eps, "steps": self.steps}
        return {**super().settings, **own, "versions": {"scikit-image": self._version}}

    def purify_one(self, image: Tensor, index: int) -> Tensor:
        """Denoise each channel."""
        restoration = library("skimage.restoration", defense=self.name)
        pixels = restoration.denoise_tv_chambolle(
            to_hwc(image), weight=self.weight, eps=self.eps, max_num_iter=self.steps, channel_axis=-1
        )
        return from_hwc(pixels, image)


class BitDepth(Purifier):
    """Fewer bits a colour (Xu et al. 2018; Guo et al. 2018, whose 3 bits are the default).

    Broken by He et al. 2017 (feature squeezing) and Athalye et al. 2018 (BPDA).

    Args:
        victim: as in `Purifier`.
        bits: a channel, 1 to 8; values are rounded to the nearest of 2^bits levels that include 0 and 1.
        seed: as in `Purifier`; nothing is drawn.
    """

    name: ClassVar[str] = "bit_depth"

    def __init__(self, victim: nn.Module, *, bits: int = 3, seed: int = 0) -> None:
        super().__init__(victim, seed=seed)
        self.bits = check_int(bits, name="bits", low=1, high=8)

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Purifier`, with the number of bits."""
        return {**super().settings, "bits": self.bits}

    def purify_one(self, image: Tensor, index: int) -> Tensor:
        """Round to the levels."""
        steps = 2**self.bits - 1
        return (image * steps).round() / steps
