"""The CIFAR-10 ResNets of He et al. (2016), section 4.2: 6n + 2 layers, parameter-free shortcuts (option A)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dipguard.checks import check_choice
from dipguard.victims.base import CIFAR10_CLASSES, IMAGENET_MEAN, IMAGENET_STD, Normalised
from dipguard.victims.weights import load_state_dict_strict

# The weights' public original is akamaster/pytorch_resnet_cifar10 (BSD-2); a file's suffix starts its sha256.
_FOLDER = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/"
WEIGHTS_URL: dict[int, str] = {
    20: _FOLDER + "resnet20-12fca82f.th",
    32: _FOLDER + "resnet32-d509ac18.th",
    44: _FOLDER + "resnet44-014dd654.th",
    56: _FOLDER + "resnet56-4bfd9763.th",
}


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A: every stride-th pixel, new channels are zeros, half of them before and half after the old ones."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))


class CifarResNet(nn.Module):
    """ResNet of ``6 * blocks + 2`` layers for normalised 32x32 images [B, 3, 32, 32]; logits [B, 10].

    Three stages of ``blocks`` basic blocks with 16, 32 and 64 channels, global average pooling, one linear layer.
    """

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
        logits: Tensor = self.linear(torch.mean(x, dim=(2, 3)))
        return logits


def _stage(inputs: int, outputs: int, *, stride: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(_Block(inputs, outputs, stride), *(_Block(outputs, outputs, 1) for _ in range(blocks - 1)))


def build(*, depth: int, weights: str | Path | None = None) -> Normalised:
    """Return the pretrained ResNet of ``depth`` 20, 32, 44 or 56 for images in [0, 1].

    Args:
        depth: number of layers.
        weights: path or https address of a state dict; by default the public original (`WEIGHTS_URL`), downloaded once.

    Raises:
        ValueError: another ``depth``, or weights that do not fit or are damaged.
        FileNotFoundError, RuntimeError: no weights file, or no download.
    """
    check_choice(str(depth), [str(known) for known in WEIGHTS_URL], name="depth")
    network = CifarResNet((depth - 2) // 6)
    load_state_dict_strict(network, WEIGHTS_URL[depth] if weights is None else weights)
    return Normalised(network, mean=IMAGENET_MEAN, std=IMAGENET_STD, classes=CIFAR10_CLASSES, size=(32, 32))
