"""CIFAR-10 classifiers for 32x32 images: ResNets of He et al. (2016), a ResNet-50, and an adversarially trained CNN.

The weights of the ResNets with 20 to 56 layers are those of akamaster/pytorch_resnet_cifar10 (BSD-2), downloaded on
first use; their file names hold the start of their SHA-256. The others need ``weights``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dipguard.registry import import_extra
from dipguard.victims.base import IMAGENET_MEAN, IMAGENET_STD, Normalised
from dipguard.victims.weights import load_state_dict_strict

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

WEIGHTS_URL = {
    depth: f"https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/resnet{depth}-{digest}.th"
    for depth, digest in ((20, "12fca82f"), (32, "d509ac18"), (44, "014dd654"), (56, "4bfd9763"))
}
"""Number of layers -> address of the public weights."""


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        # Option A: every stride-th pixel; new channels are zeros, half of them before and half after the old ones.
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))


class CifarResNet(nn.Module):
    """The CIFAR-10 ResNet of He et al. (2016), section 4.2, with ``6 * blocks + 2`` layers and shortcuts A."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, stride=1, blocks=blocks)
        self.layer2 = _stage(16, 32, stride=2, blocks=blocks)
        self.layer3 = _stage(32, 64, stride=2, blocks=blocks)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, 10] of normalised images [B, 3, H, W]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.mean(x, dim=(2, 3)))


def _stage(inputs: int, outputs: int, *, stride: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(_Block(inputs, outputs, stride), *(_Block(outputs, outputs, 1) for _ in range(blocks - 1)))


def _resnet(depth: int, weights: str | Path | None) -> Normalised:
    weights = WEIGHTS_URL[depth] if weights is None else weights
    return _cifar10(CifarResNet((depth - 2) // 6), weights, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def resnet20(*, weights: str | Path | None = None) -> Normalised:
    """CIFAR-10 ResNet with 20 layers, pretrained."""
    return _resnet(20, weights)


def resnet32(*, weights: str | Path | None = None) -> Normalised:
    """CIFAR-10 ResNet with 32 layers, pretrained."""
    return _resnet(32, weights)


def resnet44(*, weights: str | Path | None = None) -> Normalised:
    """CIFAR-10 ResNet with 44 layers, pretrained."""
    return _resnet(44, weights)


def resnet56(*, weights: str | Path | None = None) -> Normalised:
    """CIFAR-10 ResNet with 56 layers, pretrained."""
    return _resnet(56, weights)


def resnet50(
    *,
    weights: str | Path | None = None,
    mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
    std: Sequence[float] = (0.2471, 0.2435, 0.2616),
) -> Normalised:
    """The paper's CIFAR-10 victim: torchvision's ResNet-50 with a 3x3 first convolution of stride 1.

    This is the network of huyvnphan/PyTorch_CIFAR10 (23,520,842 parameters). ``weights`` are required; ``mean`` and
    ``std`` are those of their training. The repository's first ones (2019) had the ``std`` 0.2023, 0.1994, 0.2010.
    """
    if not weights:
        raise ValueError(
            "`victim.weights` must name a state dict for cifar10_resnet50, got none: the README of "
            "https://github.com/huyvnphan/PyTorch_CIFAR10 links to an archive with state_dicts/resnet50.pt"
        )
    models = import_extra("torchvision.models", owner="the victim 'cifar10_resnet50'", extra="vision")
    network = models.resnet50(weights=None, num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    return _cifar10(network, weights, mean=mean, std=std)


def cnn_a(*, weights: str | Path | None = None) -> Normalised:
    """A small adversarially trained CNN (CNN-A of papers on verification): a robust classifier to compare with."""
    if not weights:
        raise ValueError(
            "`victim.weights` must name a state dict for cifar_cnn_a, got none: its adversarially trained weights, "
            "cifar_cnn_a_adv4.pth and the like, come with collections of networks for verification"
        )
    return _cifar10(cnn_a_network(), weights, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))


def cnn_a_network() -> nn.Sequential:
    """Return CNN-A with random weights, for normalised images [B, 3, 32, 32] (214,918 parameters)."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def _cifar10(network: nn.Module, weights: str | Path, *, mean: Sequence[float], std: Sequence[float]) -> Normalised:
    load_state_dict_strict(network, weights)
    return Normalised(network, mean=mean, std=std, classes=CIFAR10_CLASSES, size=(32, 32))
