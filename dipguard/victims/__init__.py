"""Victims: classifiers of images in [0, 1] that return logits.

A new one is one file with a ``build`` function, and one row in `VICTIMS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dipguard.classifier import frozen
from dipguard.registry import check_options, resolve
from dipguard.victims.base import Normalised, check_victim
from dipguard.victims.weights import load_state_dict_strict

__all__ = ["VICTIMS", "Normalised", "build_victim", "check_victim", "frozen", "load_state_dict_strict"]

VICTIMS: dict[str, tuple[str, dict[str, Any]]] = {
    "digits_cnn": ("dipguard.victims.digits:build", {}),
    "cifar10_resnet20": ("dipguard.victims.cifar_resnet:build", {"depth": 20}),
    "cifar10_resnet32": ("dipguard.victims.cifar_resnet:build", {"depth": 32}),
    "cifar10_resnet44": ("dipguard.victims.cifar_resnet:build", {"depth": 44}),
    "cifar10_resnet56": ("dipguard.victims.cifar_resnet:build", {"depth": 56}),
    "cifar10_resnet50": ("dipguard.victims.cifar10_resnet50:build", {}),
    "cifar_cnn_a": ("dipguard.victims.cifar_cnn_a:build", {}),
    "torchvision": ("dipguard.victims.torchvision_models:build", {}),
    "timm": ("dipguard.victims.timm_models:build", {}),
    "huggingface": ("dipguard.victims.huggingface_models:build", {}),
}
"""Name -> (the function that builds it, the options that the name fixes). It takes ``weights`` and its own options."""


def build_victim(name: str, *, weights: str | Path | None = None, **options: Any) -> nn.Module:
    """Return the victim called ``name`` (a key of `VICTIMS`) in eval mode, on the CPU.

    It takes images [B, 3, H, W] in [0, 1] and returns logits [B, C]; normalisation is inside. The caller's random state
    is left as it was.

    Args:
        name: victim.
        weights: path or https address of its weights (for ``torchvision`` also a weights name, for ``huggingface`` a
            hub id or a folder); None for the victim's own: trained on first use (``digits_cnn``), downloaded, or an
            error that says where to find them.
        options: the victim's own options.

    Raises:
        TypeError: an option that the victim does not have.
        ValueError: an unknown name or option value, or weights that are damaged or do not fit.
        FileNotFoundError, RuntimeError: no weights file, or no download.
        ImportError: a library of the victim is not installed.
    """
    build = resolve({key: row[0] for key, row in VICTIMS.items()}, name, argument="victim")
    fixed = VICTIMS[name][1]
    check_options(build, options, owner=f"the victim {name!r}", hidden=("weights", *fixed))
    # Initial weights, soon overwritten, are drawn from the global generator; weights made in inference mode would
    # forbid every later gradient, also the attacker's.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        victim: nn.Module = build(weights=weights, **fixed, **options)
    return victim.eval()
