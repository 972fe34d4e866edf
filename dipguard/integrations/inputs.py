"""Purify the input of any classifier: undo its normalisation, choose indices, and isolate the defence."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from lightning_fabric.plugins.precision.utils import _DtypeContextManager
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from dipguard.attacks.target import Purifies, check_defense
from dipguard.checks import ROUNDING, Indices, check_choice, check_images
from dipguard.seeding import kept_rng
from dipguard.victims.base import Channels, check_channels

_ROUNDING = 1e-2  # how far outside [0, 1] a denormalised pixel may be (bfloat16 has 8 bits); it is clamped
DRAWS = ("content", "position")
"""Where an image's index, which seeds its draws, comes from by default: a hash of its pixels, the same in any batch and
process, or its position in the batch."""


class Pixels:
    """Undoes a normalisation (x - mean) / std of three channels, and applies it again; None for images without one."""

    def __init__(self, mean: Channels = None, std: Channels = None) -> None:
        if (mean is None) != (std is None):
            raise ValueError(f"`mean` and `std` must be given together, got {mean!r} and {std!r}")
        self.normalised = mean is not None
        self._mean = check_channels((0, 0, 0) if mean is None else mean, name="mean")
        self._std = check_channels((1, 1, 1) if std is None else std, name="std")

    def restore(self, images: Tensor) -> Tensor:
        """Return images [N, 3, H, W] of any float type as pixels in [0, 1], float32 or float64."""
        plain = isinstance(images, Tensor) and images.is_floating_point() and images.ndim == 4
        if not plain or images.shape[1] != 3 or 0 in images.shape:
            return check_images(images)  # raises an error that names the problem
        wide = images.detach() if images.dtype == torch.float64 else images.detach().float()
        pixels = wide * self._std.to(wide) + self._mean.to(wide)
        low, high = map(float, torch.aminmax(pixels))
        slack = _ROUNDING if self.normalised else ROUNDING
        if low < -slack or high > 1 + slack:
            advice = "must be the pipeline's" if self.normalised else "are needed if your pipeline normalises them"
            got = f"got values from {low:.8g} to {high:.8g}"
            raise ValueError(f"`images` must lie in [0, 1], {got}: `mean` and `std` {advice}")
        return check_images(pixels.clamp(0, 1))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return pixels [N, 3, H, W] in [0, 1] with the normalisation applied."""
        return (pixels - self._mean.to(pixels)) / self._std.to(pixels)


def content_indices(images: Tensor) -> Tensor:
    """Hash each image of [N, 3, H, W] to an index int64 [N] of 63 bits (SHA-256 of its float32 values)."""
    values = images.detach().float().cpu().contiguous().numpy()
    digests = (hashlib.sha256(image.tobytes()).digest() for image in values)
    return torch.tensor([int.from_bytes(digest[:8], "big") >> 1 for digest in digests], dtype=torch.int64, device="cpu")


class LoaderPositions:
    """Positions in the data set of the images that a data loader yields.

    The k-th image that a process loads has position k, or k R + r if a `DistributedSampler` shares the data among R
    processes and this is process r. The loader must keep the order of the data set, as Lightning's do except in fit.
    """

    def __init__(self, loader: Any) -> None:
        batches = getattr(loader, "batch_sampler", None)
        sampler = getattr(batches, "sampler", None) or getattr(loader, "sampler", None)
        self._sampler = sampler if isinstance(sampler, DistributedSampler) else None
        self._seen = 0

    def next(self, count: int) -> tuple[Tensor, Tensor]:
        """Return positions int64 [count], and whether `DistributedSampler` repeats them to fill up, bool [count]."""
        order = torch.arange(self._seen, self._seen + count, device="cpu")
        self._seen += count
        if self._sampler is None:
            return order, torch.zeros(count, dtype=torch.bool, device="cpu")
        order = order * self._sampler.num_replicas + self._sampler.rank
        size = len(self._sampler.dataset)  # type: ignore[arg-type]
        return order % size, order >= size


class InputPurifier:
    """Purifies the input of a classifier: of any float type, normalised or not, in any mode of torch.

    Modes and dtypes of the caller do not reach the defence, and the caller's random state is restored. As this is no
    module, the defence is not part of any state dict, mode or device switch.

    ``mean`` and ``std`` are the input's normalisation per channel, None for input in [0, 1]; ``draws``, one of `DRAWS`,
    is for images that come without indices; ``quiet`` hides the progress bar of the defence.
    """

    def __init__(
        self,
        defense: Purifies,
        *,
        mean: Channels = None,
        std: Channels = None,
        draws: str = "content",
        quiet: bool = False,
    ) -> None:
        self.defense: Any = check_defense(defense)
        self.pixels = Pixels(mean, std)
        self.draws = check_choice(draws, DRAWS, name="draws")
        self.quiet = quiet

    def __call__(self, images: Tensor, *, indices: Indices | None = None) -> Tensor:
        """Return purified images [N, 3, H', W'], detached, of the images' dtype and device, normalised like them.

        ``images`` are [N, 3, H, W] as the classifier takes them, ``indices`` [N] their positions in the whole data set.
        """
        hidden = self.quiet and getattr(self.defense, "progress", False) is True
        # No autocast, and float32 as default dtype: what Lightning's precision plugins change around a step.
        device = images.device.type if isinstance(images, Tensor) else "cpu"
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast(device, enabled=False),
            kept_rng(),
            _DtypeContextManager(torch.float32),
        ):
            pixels = self.pixels.restore(images)
            if indices is None:
                order = torch.arange(len(pixels), device="cpu")
                indices = content_indices(pixels) if self.draws == "content" else order
            try:
                if hidden:
                    self.defense.progress = False
                purified: Tensor = self.defense.purify(pixels, indices=torch.as_tensor(indices).detach().cpu().clone())
            finally:
                if hidden:
                    self.defense.progress = True
            return self.pixels.normalise(purified).to(images)
