"""SR (Mustafa et al. 2019): wavelet denoising, JPEG, and super-resolution back onto the manifold of natural images."""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dipguard.checks import check_choice, check_float, check_int
from dipguard.defenses.network_defense import NetworkDefense
from dipguard.defenses.transforms import from_hwc, jpeg_round_trip, to_hwc

OUTPUTS = ("bicubic", "doubled")
FEATURES = 64


def wavelet_denoise(pixels: np.ndarray, *, sigma: float) -> np.ndarray:
    """Denoise [H, W, 3] in [0, 1] like Mustafa et al. 2019, with scikit-image and PyWavelets; the same range.

    In YCbCr each channel is scaled to [0, 1] by its own least and largest value, decomposed into Haar wavelets on three
    levels less than would be possible (at least one), soft-thresholded with BayesShrink (Chang et al. 2000) in each
    sub-band, and scaled back. A channel of one value stays unchanged.

    ``sigma``, above 0, is the standard deviation of the noise in the scaled channels, as it was for the authors' code
    of 2019. (Later versions of the library scale sigma along with the channels, which are therefore scaled here.)
    """
    color, denoise = import_module("skimage.color"), import_module("skimage.restoration").denoise_wavelet
    options = {"sigma": sigma, "wavelet": "haar", "method": "BayesShrink", "mode": "soft", "rescale_sigma": False}
    channels = color.rgb2ycbcr(pixels.astype(np.float64))
    for channel in np.moveaxis(channels, -1, 0):
        low, high = channel.min(), channel.max()
        if high > low:
            channel[:] = low + (high - low) * denoise((channel - low) / (high - low), **options)
    return np.clip(color.ycbcr2rgb(channels), 0, 1)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class IMDN(nn.Module):
    """IMDN x2 (Hui et al. 2019), information multi-distillation, 694,404 parameters, named like its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fea_conv = _conv(3, FEATURES)
        for number in range(1, 7):
            self.add_module(f"IMDB{number}", _DistillationBlock())
        self.c = nn.Sequential(nn.Conv2d(6 * FEATURES, FEATURES, 1), nn.LeakyReLU(0.05))
        self.LR_conv = _conv(FEATURES, FEATURES)
        self.upsampler = nn.Sequential(_conv(FEATURES, 12), nn.PixelShuffle(2))

    def forward(self, images: Tensor) -> Tensor:
        """Double images [n, 3, H, W] in [0, 1]; the result [n, 3, 2H, 2W] is not limited to [0, 1]."""
        first = x = self.fea_conv(images)
        outputs: list[Tensor] = []
        for number in range(1, 7):
            outputs.append(x := self.get_submodule(f"IMDB{number}")(x))
        return self.upsampler(first + self.LR_conv(self.c(torch.cat(outputs, dim=1))))


class _DistillationBlock(nn.Module):
    """Four convolutions; each keeps 16 channels and passes the rest on, the last keeps all of its 16."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = _conv(FEATURES, FEATURES), _conv(48, FEATURES), _conv(48, FEATURES)
        self.c4 = _conv(48, 16)
        self.cca = _ContrastAttention()
        self.c5 = nn.Conv2d(FEATURES, FEATURES, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, passed = [], x
        for convolution in (self.c1, self.c2, self.c3):
            part, passed = F.leaky_relu(convolution(passed), 0.05).split((16, 48), dim=1)
            kept.append(part)
        return x + self.c5(self.cca(torch.cat([*kept, self.c4(passed)], dim=1)))


class _ContrastAttention(nn.Module):
    """Scales each channel by what two layers make of its standard deviation plus mean over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_du = nn.Sequential(nn.Conv2d(FEATURES, 4, 1), nn.ReLU(), nn.Conv2d(4, FEATURES, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)
        contrast = ((x - mean) ** 2).mean(dim=(2, 3), keepdim=True).sqrt()
        return x * self.conv_du(contrast + mean)


class SuperResolution(NetworkDefense):
    """Super-resolution as a defence (Mustafa et al. 2019): denoise, save as JPEG, double the size.

    Mustafa et al. show security in gray-box settings. Ding et al. 2021 (section 4.3.1, Figure 4) show its accuracy fall
    furthest of all under BPDA, with a down-sampling backward; we know of no paper that is devoted to breaking it.
    Mustafa et al. doubled with EDSR (Lim et al. 2017); here it is IMDN (Hui et al. 2019).

    Args:
        weights: State dict of IMDN x2.
        sigma: See `wavelet_denoise`; 0 leaves that step out.
        quality: Quality of the JPEG file between the two steps, 1 to 100; its chroma is 4:2:0.
        output: What to do with the doubled image, rounded to 8 bits like the authors' file: scale it down to the given
            size (``bicubic``, anti-aliased), or keep it (``doubled``), like the authors; the victim must
            then read both sizes. Scaling down takes back much of what super-resolution added.
    """

    name: ClassVar[str] = "sr"
    OPTIONS: ClassVar[tuple[str, ...]] = ("sigma", "quality", "output")
    LIBRARIES: ClassVar[dict[str, str]] = {"pillow": "PIL", "pywavelets": "pywt", "scikit-image": "skimage"}
    network_class = IMDN
    weights_source = "IMDN's authors publish theirs at https://github.com/Zheng222/IMDN (checkpoints/IMDN_x2.pth)"

    def __init__(
        self, victim: nn.Module, *, sigma: float = 0.01, quality: int = 95, output: str = "bicubic", **options: Any
    ) -> None:
        super().__init__(victim, **options)
        self.sigma = check_float(sigma, name="sigma", low=0)
        self.quality = check_int(quality, name="quality", low=1, high=100)
        self.output = check_choice(output, OUTPUTS, name="output")

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return twice the given size if the doubled image is kept."""
        return (2 * height, 2 * width) if self.output == "doubled" else (height, width)

    def purify_image(self, image: Tensor, index: int) -> Tensor:
        """Denoise, compress, double, scale down."""
        prepared = from_hwc(self.prepare(to_hwc(image)), image.float())
        made = (self.run(prepared[None]).clamp(0, 1) * 255).round() / 255
        if self.output == "bicubic":
            made = F.interpolate(made, size=(image.shape[-2], image.shape[-1]), mode="bicubic", antialias=True)
        return made[0].clamp(0, 1).to(image)

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """Denoise and compress [H, W, 3] in [0, 1]: what the upscaler gets. Needs no weights."""
        if self.sigma > 0:
            # Truncated, not rounded, to 8 bits: this matches the authors' published file to 42.7 dB (rounding: 40.6).
            pixels = np.floor(wavelet_denoise(pixels, sigma=self.sigma) * 255) / 255
        return jpeg_round_trip(pixels, quality=self.quality)
