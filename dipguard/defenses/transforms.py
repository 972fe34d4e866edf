"""Fixed transforms of the image: none, JPEG, median filter, total variation, bit depth.

None has anything to learn, so none needs weights. All have fallen to adaptive attacks; each class names them.
"""

from __future__ import annotations

import io
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from dipguard.checks import check_int, check_positive
from dipguard.defenses.base import Defense


def to_hwc(image: Tensor) -> np.ndarray:
    """Convert [3, H, W] of any float type to [H, W, 3] float32."""
    return image.float().cpu().permute(1, 2, 0).contiguous().numpy()


def from_hwc(pixels: np.ndarray, like: Tensor) -> Tensor:
    """Convert [H, W, 3] to [3, H, W] of the dtype and on the device of ``like``, clamped to [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).to(like).clamp(0, 1)


def jpeg_round_trip(pixels: np.ndarray, *, quality: int) -> np.ndarray:
    """Compress [H, W, 3] in [0, 1], rounded to 8 bits, with Pillow's JPEG (4:2:0); return what it decodes to."""
    pil, file = import_module("PIL.Image"), io.BytesIO()
    levels = np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    pil.fromarray(levels).save(file, format="JPEG", quality=quality, subsampling="4:2:0")
    return np.asarray(pil.open(file), dtype=np.float32) / 255


class NoDefense(Defense):
    """Return a copy of the images ("No defense" in Table 1)."""

    name: ClassVar[str] = "none"

    def purify_image(self, image: Tensor, index: int) -> Tensor:
        """Return the image as it is."""
        return image


class JPEG(Defense):
    """JPEG compression (Dziugaite et al. 2016; Das et al. 2017; Guo et al. 2018, whose quality 75 is the default).

    ``quality`` is that of Pillow's scale, 1 to 100; the chroma is 4:2:0. Broken by Athalye et al. 2018 (BPDA).
    """

    name: ClassVar[str] = "jpeg"
    OPTIONS: ClassVar[tuple[str, ...]] = ("quality",)
    LIBRARIES: ClassVar[dict[str, str]] = {"pillow": "PIL"}

    def __init__(self, victim: nn.Module, *, quality: int = 75, **options: Any) -> None:
        super().__init__(victim, **options)
        self.quality = check_int(quality, name="quality", low=1, high=100)

    def purify_image(self, image: Tensor, index: int) -> Tensor:
        """Compress and decode."""
        return from_hwc(jpeg_round_trip(to_hwc(image), quality=self.quality), image)


class Median(Defense):
    """Median filter, channel by channel (Xu et al. 2018, feature squeezing), with SciPy; mirrored at the border.

    ``size`` is the side of the square window in pixels, at least 2 (that of Xu et al.). An even window reaches one
    pixel further up and left, and takes the upper of the two middle values. Broken by He et al. 2017, who attacked
    feature squeezing with an adaptive attack.
    """

    name: ClassVar[str] = "median"
    OPTIONS: ClassVar[tuple[str, ...]] = ("size",)
    LIBRARIES: ClassVar[dict[str, str]] = {"scipy": "scipy"}

    def __init__(self, victim: nn.Module, *, size: int = 3, **options: Any) -> None:
        super().__init__(victim, **options)
        self.size = check_int(size, name="size", low=2)

    def purify_image(self, image: Tensor, index: int) -> Tensor:
        """Filter each channel."""
        filtered = import_module("scipy.ndimage").median_filter(to_hwc(image), (self.size, self.size, 1))
        return from_hwc(filtered, image)


class TotalVariation(Defense):
    """Total-variation denoising (Rudin et al. 1992) by Chambolle's algorithm (2004) with scikit-image.

    Each channel is denoised on its own; ``weight``, above 0, is that of the total variation against half the squared
    distance to the image. Guo et al. 2018 defend with total variation after dropping random pixels; nothing is dropped
    here. Theirs was broken by Athalye et al. 2018 (BPDA and EOT).
    """

    name: ClassVar[str] = "total_variation"
    OPTIONS: ClassVar[tuple[str, ...]] = ("weight",)
    LIBRARIES: ClassVar[dict[str, str]] = {"scikit-image": "skimage"}

    def __init__(self, victim: nn.Module, *, weight: float = 0.1, **options: Any) -> None:
        super().__init__(victim, **options)
        self.weight = check_positive(weight, name="weight")

    def purify_image(self, image: Tensor, index: int) -> Tensor:
        """Denoise each channel."""
        denoise = import_module("skimage.restoration").denoise_tv_chambolle
        return from_hwc(denoise(to_hwc(image), weight=self.weight, channel_axis=-1), image)


class BitDepth(Defense):
    """Fewer ``bits`` per channel, 1 to 8 (Xu et al. 2018; Guo et al. 2018, whose 3 bits are the default).

    Values are rounded to the nearest of 2^bits levels that include 0 and 1. Broken by He et al. 2017 (feature
    squeezing) and Athalye et al. 2018 (BPDA).
    """

    name: ClassVar[str] = "bit_depth"
    OPTIONS: ClassVar[tuple[str, ...]] = ("bits",)

    def __init__(self, victim: nn.Module, *, bits: int = 3, **options: Any) -> None:
        super().__init__(victim, **options)
        self.bits = check_int(bits, name="bits", low=1, high=8)

    def purify_image(self, image: Tensor, index: int) -> Tensor:
        """Round to the levels."""
        steps = 2**self.bits - 1
        return (image * steps).round() / steps
