"""NRP (Naseer et al. 2020): a purifier trained against self-supervised perturbations of feature space."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dipguard.checks import check_bool
from dipguard.defenses.network_defense import NetworkDefense
from dipguard.seeding import image_generator

BLOCKS, FEATURES, GROWTH = 23, 64, 32
NOISE, NOISE_LIMIT = 0.05, 16 / 255
"""Standard deviation of the dynamic variant's noise, and the largest change that it may make."""


class _DenseBlock(nn.Module):
    """Five 3x3 convolutions, each of the concatenation of all before it; the last one is added to the input."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(5):
            outputs = FEATURES if number == 4 else GROWTH
            self.add_module(f"conv{number + 1}", nn.Conv2d(FEATURES + number * GROWTH, outputs, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.children()
        features = x
        for convolution in hidden:
            features = torch.cat((features, F.leaky_relu(convolution(features), 0.2)), dim=1)
        return x + 0.2 * last(features)


class _ResidualInResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.RDB1, self.RDB2, self.RDB3 = _DenseBlock(), _DenseBlock(), _DenseBlock()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + 0.2 * self.RDB3(self.RDB2(self.RDB1(x)))
        return result


class NRPNetwork(nn.Module):
    """The purifier of Naseer et al. 2020: 23 residual-in-residual dense blocks, named like the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(3, FEATURES, 3, padding=1)
        self.RRDB_trunk = nn.Sequential(*(_ResidualInResidual() for _ in range(BLOCKS)))
        self.trunk_conv = nn.Conv2d(FEATURES, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Purify images [n, 3, H, W] in [0, 1]; the result is not limited to [0, 1]."""
        result: Tensor = self.trunk_conv(self.RRDB_trunk(self.conv_first(images)))
        return result


class NRP(NetworkDefense):
    """Neural representation purifier (Naseer et al. 2020).

    Its authors' own code by-passes it with a straight-through attack; the dynamic variant is against that. Ding et al.
    2021 (section 4.3.1, Figure 4) show its accuracy fall under BPDA with an identity backward, already at eps 2/255.

    Args:
        weights: The authors' file NRP.pth.
        dynamic: Add noise N(0, 0.05), cut to 16/255, before the image is purified.
    """

    name: ClassVar[str] = "nrp"
    OPTIONS: ClassVar[tuple[str, ...]] = ("dynamic",)
    weights_source = (
        "the authors link to theirs at https://github.com/Muzammal-Naseer/NRP (Pretrained Purifiers, NRP.pth)"
    )

    def __init__(self, victim: nn.Module, *, dynamic: bool = False, **options: Any) -> None:
        super().__init__(victim, **options)
        self.dynamic = check_bool(dynamic, name="dynamic")

    def make_network(self) -> nn.Module:
        """Return the untrained network."""
        return NRPNetwork()

    @property
    def random(self) -> bool:
        """Whether noise is added."""
        return self.dynamic

    @property
    def settings(self) -> dict[str, Any]:
        """The variant, the weights' digest and the noise."""
        return super().settings | ({"noise": NOISE, "noise_limit": NOISE_LIMIT} if self.dynamic else {})

    def purify_image(self, image: Tensor, index: int) -> Tensor:
        """Add the noise of the dynamic variant, run the network, limit to [0, 1]."""
        given = image
        if self.dynamic:
            noise = torch.empty(image.shape, dtype=torch.float32)
            noise.normal_(0, NOISE, generator=image_generator(seed=self.seed, index=index, purpose="nrp"))
            given = (image + noise.clamp(-NOISE_LIMIT, NOISE_LIMIT).to(image)).clamp(0, 1)
        return self.run(given[None])[0].clamp(0, 1).to(image)
