"""SR (Mustafa et al. 2019): wavelet denoising, JPEG, and super-resolution back onto the manifold of natural images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from dipguard.checks import check_choice, check_float, check_int
from dipguard.defenses.base import library
from dipguard.defenses.network_defense import NetworkDefense
from dipguard.defenses.transforms import from_hwc, jpeg_round_trip, to_hwc
from dipguard.defenses.upscalers import EDSR, IMDN
from dipguard.victims.weights import load_state_dict_strict

SUBSAMPLING = "4:2:0"
SOURCES = {
    "edsr": "https://github.com/sanghyun-son/EDSR-PyTorch names those of EDSR baseline x2 "
    "(edsr_baseline_x2-1bc95232.pt), which Mustafa et al. took",
    "imdn": "its authors publish them at https://github.com/Zheng222/IMDN (checkpoints/IMDN_x2.pth)",
}
"""Upscaler -> where its weights come from."""
OUTPUTS = ("bicubic", "area", "doubled")


def wavelet_denoise(pixels: np.ndarray, *, sigma: float, defense: str = "sr") -> np.ndarray:
    """Denoise [H, W, 3] in [0, 1] as Mustafa et al. 2019 do, with scikit-image and PyWavelets; the same range.

    In YCbCr each channel is scaled to [0, 1] by its own least and largest value, decomposed into Haar wavelets on three
    levels less than would be possible (at least one), soft-thresholded with BayesShrink (Chang et al. 2000) in each
    sub-band, and scaled back. A channel of one value stays as it is.

    Args:
        pixels: the image.
        sigma: standard deviation of the noise in the scaled channels, above 0. (That is what the authors' code of 2019
            did; since then the library scales sigma along with the channels, which is therefore done here.)
        defense: name of the defence, for the message that says what to install.
    """
    color = library("skimage.color", defense=defense)
    restoration = library("skimage.restoration", defense=defense)
    channels = color.rgb2ycbcr(pixels.astype(np.float64))
    for channel in np.moveaxis(channels, -1, 0):
        low, high = channel.min(), channel.max()
        if high > low:
            scaled = (channel - low) / (high - low)
            channel[:] = low + (high - low) * restoration.denoise_wavelet(
                scaled, sigma=sigma, wavelet="haar", method="BayesShrink", mode="soft", rescale_sigma=False
            )
    return np.clip(color.ycbcr2rgb(channels), 0, 1)


class SuperResolution(NetworkDefense):
    """Super-resolution as a defence (Mustafa et al. 2019): denoise, save as JPEG, double the size.

    Mustafa et al. show security in gray-box settings. Ding et al. 2021 (section 4.3.1, Figure 4) show its accuracy fall
    furthest of all under BPDA, with a down-sampling backward; we know of no paper that is devoted to breaking it.

    Args:
        victim: as in `Purifier`.
        weights: as in `NetworkDefense`, of the ``upscaler``.
        upscaler: ``imdn`` (Hui et al. 2019), or ``edsr`` (Lim et al. 2017), which Mustafa et al. took.
        sigma: see `wavelet_denoise`; 0 leaves that step out.
        quality: of the JPEG file between the two steps, 1 to 100; its chroma is 4:2:0.
        output: what to do with the doubled image, rounded to 8 bits as the authors' file is: scale it down to the given
            size (``bicubic``, anti-aliased, or ``area``, the mean of 2x2 pixels), or keep it (``doubled``), as the
            authors do with a classifier for that size. Scaling down takes back much of what super-resolution added.
        seed: as in `Purifier`; nothing is drawn.
    """

    name: ClassVar[str] = "sr"

    def __init__(
        self,
        victim: nn.Module,
        *,
        weights: str | Path | None = None,
        upscaler: str = "imdn",
        sigma: float = 0.01,
        quality: int = 95,
        output: str = "bicubic",
        seed: int = 0,
    ) -> None:
        self.upscaler = check_choice(upscaler, SOURCES, name="upscaler")
        super().__init__(victim, weights=weights, seed=seed)
        self.sigma = check_float(sigma, name="sigma", low=0)
        self.quality = check_int(quality, name="quality", low=1, high=100)
        self.output = check_choice(output, OUTPUTS, name="output")
        modules = {"pillow": "PIL", "pywavelets": "pywt", "scikit-image": "skimage"}
        self._versions = {
            project: str(library(module, defense=self.name).__version__) for project, module in modules.items()
        }

    def make_network(self) -> nn.Module:
        """Return the untrained upscaler."""
        return IMDN() if self.upscaler == "imdn" else EDSR()

    def load_network(self, weights: str | Path) -> nn.Module:
        """As in `NetworkDefense`; EDSR's two fixed convolutions may be missing."""
        if self.upscaler == "edsr":
            try:
                return super().load_network(weights)
            except ValueError:
                return load_state_dict_strict(EDSR(stored_mean=False).float(), weights, argument="weights")
        return super().load_network(weights)

    def where_weights_come_from(self) -> str:
        """Depends on the upscaler."""
        return SOURCES[self.upscaler]

    @property
    def settings(self) -> dict[str, Any]:
        """As in `NetworkDefense`, with all options and the libraries' versions."""
        values = super().settings
        values["versions"] |= self._versions
        own = {"upscaler": self.upscaler, "sigma": self.sigma, "quality": self.quality, "output": self.output}
        return {**values, **own, "subsampling": SUBSAMPLING}

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Twice the given size if the doubled image is kept."""
        return (2 * height, 2 * width) if self.output == "doubled" else (height, width)

    def purify_one(self, image: Tensor, index: int) -> Tensor:
        """Denoise, compress, double, scale down."""
        prepared = from_hwc(self.prepare(to_hwc(image)), image.float())
        doubled = (self.run(prepared[None]).clamp(0, 1) * 255).round() / 255
        return self._scale_down(doubled, (image.shape[-2], image.shape[-1]))[0].clamp(0, 1).to(image)

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """Denoise and compress [H, W, 3] in [0, 1]: what the upscaler gets. Needs no weights."""
        if self.sigma > 0:
            # Cut down, not rounded, to 8 bits: only so is the file that the authors give met to 42.7 dB (else 40.6).
            pixels = np.floor(wavelet_denoise(pixels, sigma=self.sigma, defense=self.name) * 255) / 255
        return jpeg_round_trip(pixels, quality=self.quality, subsampling=SUBSAMPLING, defense=self.name)

    def _scale_down(self, doubled: Tensor, size: tuple[int, int]) -> Tensor:
        if self.output == "bicubic":
            return F.interpolate(doubled, size=size, mode="bicubic", antialias=True)
        return F.interpolate(doubled, size=size, mode="area") if self.output == "area" else doubled
