"""NRP (Naseer et al. 2020): a purifier trained against self-supervised perturbations of feature space."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dipguard.defenses.network_defense import NetworkDefense

BLOCKS, FEATURES, GROWTH = 23, 64, 32


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
        return x + 0.2 * self.RDB3(self.RDB2(self.RDB1(x)))


class NRPNetwork(nn.Module):
    """The purifier of Naseer et al. 2020: 23 residual-in-residual dense blocks, named like the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(3, FEATURES, 3, padding=1)
        self.RRDB_trunk = nn.Sequential(*(_ResidualInResidual() for _ in range(BLOCKS)))
        self.trunk_conv = nn.Conv2d(FEATURES, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Purify images [n, 3, H, W] in [0, 1]; the result is not limited to [0, 1]."""
        return self.trunk_conv(self.RRDB_trunk(self.conv_first(images)))


class NRP(NetworkDefense):
    """Neural representation purifier (Naseer et al. 2020), without the noise of its dynamic variant.

    Its authors' own code by-passes it with a straight-through attack. Ding et al. 2021 (section 4.3.1, Figure 4) show
    its accuracy fall under BPDA with an identity backward, already at eps 2/255. ``weights`` is the authors' NRP.pth.
    """

    name: ClassVar[str] = "nrp"
    network_class = NRPNetwork
    weights_source = (
        "the authors link to theirs at https://github.com/Muzammal-Naseer/NRP (Pretrained Purifiers, NRP.pth)"
    )

    def purify_image(self, image: Tensor, index: int) -> Tensor:
        """Run the network, limit to [0, 1]."""
        return self.run(image[None])[0].clamp(0, 1).to(image)
