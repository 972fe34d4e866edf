"""The network's input: z of each image, and the jitter added to it at each step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dipguard.checks import check_choice, check_float
from dipguard.fit.options import Z_KINDS
from dipguard.seeding import image_generator

BLOCK = 8
"""Steps of jitter drawn at once. Fixed, since an image's stream must depend neither on the stack nor on T."""


def draw_z(
    shape: tuple[int, int, int], *, indices: Sequence[int], seed: int, kind: str = "uniform", scale: float
) -> Tensor:
    """z of each image: U(0, scale) (appendix B) or scale * N(0, 1) (section 3.1 calls z a Gaussian noise).

    Args:
        shape: (channels, H, W).
        indices: The images' indices.
        seed: Seed of the fit.
        kind: ``uniform`` or ``gaussian``.
        scale: Upper end, or standard deviation; above 0.

    Returns:
        [B, channels, H, W] float32 on the CPU.

    Raises:
        ValueError: An option is out of range.
    """
    check_choice(kind, Z_KINDS, name="z")
    if check_float(scale, name="z_scale", low=0.0) == 0:
        raise ValueError("`z_scale` must be above 0, got 0")
    z = torch.empty(len(indices), *shape, dtype=torch.float32)
    for b, index in enumerate(indices):
        generator = image_generator(seed=seed, index=index, purpose="z")
        if kind == "uniform":
            z[b].uniform_(0, scale, generator=generator)
        else:
            z[b].normal_(0, scale, generator=generator)
    return z


class Jitter:
    """Gaussian noise added to z at each step, as the official DIP implementation does for denoising.

    Args:
        shape: (channels, H, W) of z.
        indices: The images' indices; the noise of image b depends only on (seed, indices[b], step).
        seed: Seed of the fit.
        std: Standard deviation, above 0.
    """

    def __init__(self, shape: tuple[int, int, int], *, indices: Sequence[int], seed: int, std: float) -> None:
        self.std = check_float(std, name="jitter", low=0.0)
        self._generators = [image_generator(seed=seed, index=index, purpose="jitter") for index in indices]
        self._ready = self._block = torch.empty(len(indices), BLOCK, *shape, dtype=torch.float32)
        self._position = BLOCK

    def next(self, z: Tensor) -> Tensor:
        """Z plus the noise of the next step, [B, channels, H, W] of z's dtype and device."""
        if self._position == BLOCK:
            for b, generator in enumerate(self._generators):
                self._block[b].normal_(generator=generator)
            self._ready = self._block.to(device=z.device, dtype=z.dtype)
            self._position = 0
        noise = self._ready[:, self._position]
        self._position += 1
        return torch.add(z, noise, alpha=self.std)
