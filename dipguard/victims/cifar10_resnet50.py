"""The paper's own CIFAR-10 victim: a ResNet-50 of torchvision's design, made to fit 32x32 images.

As in the public repository huyvnphan/PyTorch_CIFAR10: the first convolution is 3x3 with stride 1 and padding 1; the 3x3
max-pooling with stride 2 after it stays; ten classes (23,520,842 parameters).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from dipguard.victims.base import CIFAR10_CLASSES, Normalised
from dipguard.victims.weights import load_state_dict_strict

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2471, 0.2435, 0.2616)


def build(*, weights: str | Path | None = None, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Normalised:
    """Return the CIFAR-10 ResNet-50 for images in [0, 1].

    Args:
        weights: path or https address of its state dict.
        mean: per-channel mean that the weights were trained with.
        std: per-channel standard deviation, likewise. That repository's first weights (2019) used 0.2023 0.1994 0.2010.

    Raises:
        ValueError: no ``weights``, or weights that do not fit or are damaged.
        FileNotFoundError, RuntimeError: no weights file, or no download.
    """
    if not weights:
        raise ValueError(
            "`victim.weights` must name a state dict for cifar10_resnet50, got none: the public weights come only "
            "in one archive with others; its address is in the README of https://github.com/huyvnphan/PyTorch_CIFAR10, "
            "unpack state_dicts/resnet50.pt from it"
        )
    from torchvision.models import resnet50

    network = resnet50(weights=None, num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    load_state_dict_strict(network, weights)
    return Normalised(network, mean=mean, std=std, classes=CIFAR10_CLASSES, size=(32, 32))
