"""Victims: classifiers of images in [0, 1]. A new one is a row of `VICTIMS` or an entry point ``dipguard.victims``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dipguard.registry import check_options, lookup, table_of
from dipguard.victims import huggingface_models, timm_models, torchvision_models
from dipguard.victims.base import Channels, Normalised, check_victim, square
from dipguard.victims.weights import load_state_dict_strict

__all__ = ["VICTIMS", "Normalised", "build_victim", "check_victim", "load_state_dict_strict"]

VICTIMS: dict[str, str] = {
    "digits_cnn": "dipguard.victims.digits:build",
    "cifar10_resnet20": "dipguard.victims.cifar:resnet20",
    "cifar10_resnet32": "dipguard.victims.cifar:resnet32",
    "cifar10_resnet44": "dipguard.victims.cifar:resnet44",
    "cifar10_resnet56": "dipguard.victims.cifar:resnet56",
    "cifar10_resnet50": "dipguard.victims.cifar:resnet50",
    "cifar_cnn_a": "dipguard.victims.cifar:cnn_a",
    "efficientnet_lite0": "dipguard.victims.timm_models:efficientnet_lite0",
    "torchvision": "dipguard.victims.torchvision_models:build",
    "timm": "dipguard.victims.timm_models:build",
    "huggingface": "dipguard.victims.huggingface_models:build",
    "robustbench": "dipguard.victims.robustbench_models:build",
}
"""Name -> function that builds the victim. It takes ``weights`` and its own options, all keyword-only."""


def build_victim(name: str | nn.Module, *, weights: str | Path | None = None, **options: Any) -> nn.Module:
    """Return a victim in eval mode; it maps images [B, 3, H, W] in [0, 1] to logits [B, C].

    TypeError or ValueError for an unknown name or option, a bad value, or weights that are damaged or do not fit,
    FileNotFoundError if a weights file is missing, RuntimeError if a download fails, ImportError if a library is not
    installed.

    Args:
        name: A key of `VICTIMS` or a name that another package registers; the victim is made on the CPU. Or a model of
            normalised images, which is put in eval mode itself (before a fit of it, call its ``train()``): one of timm,
            torchvision or transformers knows its normalisation, size and class names, any other takes ``mean``, ``std``
            and ``size`` as options.
        weights: Path or https address of a state dict. ``torchvision`` also takes the name of its weights,
            ``huggingface`` a hub id or a folder. None takes the victim's default: weights that are trained on first
            use (``digits_cnn``) or downloaded, or an error that says where to find them; a model keeps its own.
        options: Options of the victim.
    """
    if isinstance(name, str):
        owner, build = f"the victim {name!r}", lookup(table_of("victims", VICTIMS), name, argument="victim")
    else:
        owner, build = f"a {type(name).__name__} as victim", partial(of_model, name)
    check_options(build, options, owner=owner, hidden=("weights",))
    # Constructors draw from the global generator. Weights made in inference mode could not take part in autograd.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        victim: nn.Module = build(weights=weights, **options)
    for part in victim.modules():
        if hasattr(part, "training"):  # what TorchScript has frozen has no mode; eval() fails for an export
            part.training = False
    return victim


def of_model(
    model: nn.Module,
    *,
    weights: str | Path | None = None,
    mean: Channels = None,
    std: Channels = None,
    size: int | None = None,
) -> Normalised:
    """A model as a victim, out of the wrapper of torch.compile or DataParallel; ``size`` is the side of its input.

    Normalisation, size and class names are those of the configuration of its library.
    """
    network = getattr(model, "_orig_mod", model)
    network = network.module if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else network
    victim = network if isinstance(network, Normalised) else None
    if victim is not None and (mean is not None or std is not None):
        raise ValueError("`mean` and `std` must be left out for a Normalised, which has its own; or give its `network`")
    if weights is not None:
        load_state_dict_strict(network if victim is None else victim.network, weights)
    libraries = {kind.__module__.partition(".")[0] for kind in type(network).__mro__}
    if "timm" in libraries:
        victim = timm_models.of_model(network, mean=mean, std=std)
    elif "transformers" in libraries:
        victim = huggingface_models.of_model(network, mean=mean, std=std, size=size)
    elif "torchvision" in libraries:
        victim = torchvision_models.of_model(network, mean=mean, std=std, size=size)
    if victim is None:
        if mean is None or std is None:
            problem = f"a {type(network).__name__} does not say how its images are normalised"
            advice = "give `mean` and `std` (0, 0, 0 and 1, 1, 1 for images in [0, 1])"
            raise ValueError(f"`name`: {problem}: {advice}")
        victim = Normalised(network, mean=mean, std=std)
    victim.size = square(size) or victim.size
    return victim
