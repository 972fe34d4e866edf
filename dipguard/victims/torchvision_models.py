"""Classifiers of torchvision, by name or as objects. ResNet-101 is the paper's ImageNet victim."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dipguard.checks import check_int
from dipguard.files import file_digest
from dipguard.registry import import_extra
from dipguard.victims.base import Channels, Normalised, unknown_arch
from dipguard.victims.weights import HASHED, load_state_dict_strict


def build(
    *,
    arch: str = "resnet101",
    weights: str | Path | None = None,
    num_classes: int = 1000,
    mean: Channels = None,
    std: Channels = None,
) -> Normalised:
    """Any classifier of torchvision, with the preprocessing of its weights.

    Args:
        arch: Name of the architecture in torchvision.
        weights: Name of torchvision's weights for ``arch`` (``DEFAULT``, ``IMAGENET1K_V1``, ...), downloaded once, or
            path or https address of a state dict, which gets transforms and class names of ``DEFAULT`` (Inception-v3
            and GoogLeNet then normalise their input once more, as torchvision's own weights need). None means
            ``DEFAULT``.
        num_classes: Number of classes of your own state dict; torchvision's weights have 1000.
        mean, std: The normalisation, per channel; None takes that of the weights' transforms.
    """
    models = import_extra("torchvision.models", owner="the victim 'torchvision'", extra="vision")
    archs = models.list_models(module=models)
    if arch not in archs:
        raise unknown_arch(arch, archs, library="torchvision")
    check_int(num_classes, name="victim.num_classes", low=2)
    names = models.get_model_weights(arch).__members__
    chosen = "DEFAULT" if weights is None else str(weights)
    known = names[chosen if chosen in names else "DEFAULT"]
    if chosen not in names:
        if "." not in chosen and "/" not in chosen and not Path(chosen).is_file():
            known_names = f"one of {', '.join(names)}, or the path of a state dict"
            raise ValueError(f"`victim.weights` for {arch} must be {known_names}, got {chosen!r}")
        # Inception and GoogLeNet otherwise warn about their slow initialisation, which is overwritten at once. Their
        # weights are for inputs that they normalise once more, which torchvision asks for with its own weights alone.
        own = {"init_weights": False, "transform_input": True}
        extra: dict[str, Any] = own if arch in ("inception_v3", "googlenet") else {}
        network = models.get_model(arch, weights=None, num_classes=num_classes, **extra)
        load_state_dict_strict(network, chosen)
        return _with_transforms(network, known, classes=num_classes, mean=mean, std=std)
    if num_classes != 1000:
        raise ValueError(f"`victim.num_classes` must be 1000 for torchvision's own weights, got {num_classes}")
    # torch.hub checks what it downloads, but not what it has kept.
    kept = Path(torch.hub.get_dir(), "checkpoints", known.url.rpartition("/")[2])
    if kept.is_file() and not file_digest(kept).startswith("".join(HASHED.findall(kept.name))):
        kept.unlink()
    try:
        network = models.get_model(arch, weights=known)
    except (OSError, RuntimeError) as error:
        advice = "Download the file in another way and give its path as `victim.weights`"
        problem = f"{arch}'s weights {chosen} could not be fetched from {known.url}: {error}"
        raise RuntimeError(f"`victim.weights`: {problem}. {advice}") from error
    return _with_transforms(network, known, classes=1000, mean=mean, std=std)


def of_model(network: nn.Module, *, mean: Channels, std: Channels, size: int | None) -> Normalised | None:
    """A model with the preprocessing of torchvision's weights for as many parameters; None if there are none.

    A UserWarning says if these weights were made for several sizes, and none of them is asked for by ``size``.
    """
    models = import_extra("torchvision.models", owner="a model of torchvision", extra="vision")
    # GoogLeNet's weights come without its auxiliary classifiers.
    sizes = [parameter.numel() for name, parameter in network.named_parameters() if not name.startswith("aux")]
    heads = [part for part in network.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    if not heads:  # such as a quantised one
        return None
    head = heads[-1]
    classes = len(head.weight)
    count = sum(sizes) + (1000 - classes) * sum(parameter.numel() for parameter in head.parameters()) // classes
    known = [w for arch in models.list_models(module=models) for w in models.get_model_weights(arch)]
    found = [one for one in known if one.meta["num_params"] == count]
    sides = [one.transforms().crop_size[0] for one in found]
    if size is None and len(set(sides)) > 1:
        text = f"torchvision has weights of this model for images of {sides} pixels; {sides[0]} is taken: give `size`"
        warnings.warn(text, UserWarning, stacklevel=4)
    if not found:
        return None
    best = found[sides.index(size) if size in sides else 0]
    return _with_transforms(network, best, classes=classes, mean=mean, std=std)


def _with_transforms(network: nn.Module, known: Any, *, classes: int, mean: Channels, std: Channels) -> Normalised:
    preset, names = known.transforms(), known.meta["categories"]
    names, size = names if classes == len(names) else (), (preset.crop_size[0], preset.crop_size[0])
    return Normalised(
        network,
        mean=preset.mean if mean is None else mean,
        std=preset.std if std is None else std,
        classes=names,
        size=size,
        interpolation=preset.interpolation.value,
    )
