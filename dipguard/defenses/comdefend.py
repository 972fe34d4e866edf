"""ComDefend (Jia et al. 2019): compress an image to 12 noisy bits per pixel and rebuild it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dipguard.checks import check_bool, check_float, check_int
from dipguard.defenses.network_defense import NetworkDefense
from dipguard.seeding import image_generator

PATCH = 32  # side of a patch in pixels: the size that the networks were trained on
CODE = 12  # bits per pixel
_ENCODER = (3, 16, 32, 64, 128, 256, 128, 64, 32, CODE)
_DECODER = (CODE, 32, 64, 128, 256, 128, 64, 32, 16, 3)


class ComDefendNetwork(nn.Module):
    """Encoder and decoder of Jia et al. 2019: nine 3x3 convolutions each, zero padding, ELU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = (
            nn.ModuleList(nn.Conv2d(inputs, outputs, 3, padding=1) for inputs, outputs in pairwise(channels))
            for channels in (_ENCODER, _DECODER)
        )

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Rebuild images [n, 3, H, W] in [0, 1] from their bits, given noise [n, 12, H, W] on the code.

        A bit is 1 where sigmoid(code - noise) is above 0.5, which is where the code is above the noise.
        """
        bits = (_apply(self.encoder, images - 0.5) > noise).to(images.dtype)
        return torch.sigmoid(_apply(self.decoder, bits))


def _apply(convolutions: nn.ModuleList, x: Tensor) -> Tensor:
    *hidden, last = convolutions
    for convolution in hidden:
        x = F.elu(convolution(x))
    return last(x)


class ComDefend(NetworkDefense):
    """ComDefend (Jia et al. 2019): a learned compression to bits that is robust to noise on the code.

    Ding et al. 2021 (section 4.3.1, Figure 4) show its accuracy fall under BPDA, already at eps 2/255; we know of no
    paper that is devoted to breaking it.

    Args:
        weights: State dict with ``encoder.0.weight`` ... ``decoder.8.bias``, 1,566,735 parameters.
        patches: Purify patches of 32x32 pixels one by one, with the channels in the order blue, green, red, and cut the
            result down to 8 bits, as the authors' code does for ImageNet; sides must then be multiples of 32. False
            takes the whole image in the order red, green, blue, as for CIFAR-10. None takes patches where a side is
            longer than 32 pixels.
        noise: Standard deviation of the noise on the code, at least 0; the authors' is 1.
        votes: Purifications of each image, each with noise of its own. The victim's decision is that of most of them.
            Without noise it must be 1.
    """

    name: ClassVar[str] = "comdefend"
    OPTIONS: ClassVar[tuple[str, ...]] = ("patches", "noise")
    network_class = ComDefendNetwork
    weights_source = (
        "the authors publish theirs at https://github.com/jiaxiaojunQAQ/Comdefend (checkpoints/enc20_0.0001.npy and "
        "dec20_0.0001.npy, for TensorFlow), to be saved as a torch state dict with the names encoder.0.weight to "
        "decoder.8.bias"
    )

    def __init__(
        self, victim: nn.Module, *, patches: bool | None = None, noise: float = 1.0, votes: int = 1, **options: Any
    ) -> None:
        super().__init__(victim, **options)
        self.patches = None if patches is None else check_bool(patches, name="patches")
        self.noise = check_float(noise, name="noise", low=0)
        self.random = self.noise > 0
        self.votes = check_int(votes, name="votes", low=1)
        if votes > 1 and not self.random:
            raise ValueError(f"`votes` must be 1 without `noise`, since all would be the same, got {votes}")

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the given size; raises ValueError if patches of 32x32 do not fill the image."""
        if self._in_patches(height, width) and (height % PATCH or width % PATCH):
            raise ValueError(
                f"`images` must have sides that are multiples of {PATCH} pixels to be purified in patches, got "
                f"{height}x{width}; `patches=False` takes the whole image"
            )
        return height, width

    def purify_image(self, image: Tensor, index: int) -> Tensor:
        """Encode, threshold against noise, decode."""
        _, height, width = image.shape
        if not self._in_patches(height, width):
            return self._rebuild(image[None], index)[0].to(image)
        cells = image.flip(0).unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # [3, H/32, W/32, 32, 32]
        patches = self._rebuild(cells.permute(1, 2, 0, 3, 4).reshape(-1, 3, PATCH, PATCH), index)
        cells = patches.unflatten(0, (height // PATCH, width // PATCH)).permute(2, 0, 3, 1, 4)
        rebuilt = cells.reshape(3, height, width).flip(0)
        return ((rebuilt * 255).floor() / 255).to(image)

    def _rebuild(self, images: Tensor, index: int) -> Tensor:
        noise = torch.zeros(len(images), CODE, *images.shape[-2:], dtype=torch.float32, device="cpu")
        if self.random:
            generator = image_generator(seed=self.seed, index=index, purpose="comdefend")
            noise.normal_(0, self.noise, generator=generator)
        return self.run(images, noise)

    def _in_patches(self, height: int, width: int) -> bool:
        return max(height, width) > PATCH if self.patches is None else self.patches
