"""A small CNN for CIFAR-10 whose weights are adversarially trained: what a defence of an undefended victim is held to.

It is the network that papers on the verification of networks call CNN-A; their files are ``cifar_cnn_a_adv*.pth``.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from dipguard.victims.base import CIFAR10_CLASSES, Normalised
from dipguard.victims.weights import load_state_dict_strict

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)


def network() -> nn.Sequential:
    """The network for normalised images [B, 3, 32, 32]; logits [B, 10] (214,918 parameters)."""
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


def build(*, weights: str | Path | None = None) -> Normalised:
    """Return the CNN for images in [0, 1].

    Args:
        weights: path or https address of its state dict (keys ``0.weight`` to ``7.bias``).

    Raises:
        ValueError: no ``weights``, or weights that do not fit or are damaged.
        FileNotFoundError, RuntimeError: no weights file, or no download.
    """
    if not weights:
        raise ValueError(
            "`victim.weights` must name a state dict for cifar_cnn_a, got none: its adversarially trained weights are "
            "passed on as cifar_cnn_a_adv4.pth and the like, with collections of networks to be verified"
        )
    model = network()
    load_state_dict_strict(model, weights)
    return Normalised(model, mean=MEAN, std=STD, classes=CIFAR10_CLASSES, size=(32, 32))
