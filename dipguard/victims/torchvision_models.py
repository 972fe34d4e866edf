"""Classifiers of torchvision, by name. ResNet-101 is the paper's ImageNet victim."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dipguard.checks import check_choice, check_int
from dipguard.victims.base import Normalised
from dipguard.victims.weights import load_state_dict_strict


def build(
    *,
    arch: str = "resnet101",
    weights: str | Path | None = None,
    num_classes: int = 1000,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Normalised:
    """Any classifier of torchvision, with the preprocessing of its weights.

    Args:
        arch: Name of the architecture in torchvision.
        weights: Name of torchvision's weights for ``arch`` (``DEFAULT``, ``IMAGENET1K_V1``, ...), downloaded once, or
            path or https address of a state dict, which gets transforms and class names of ``DEFAULT``. None means
            ``DEFAULT``.
        num_classes: Number of classes of your own state dict; torchvision's weights have 1000.
        mean: Per-channel mean of the normalisation; None takes that of the weights' transforms.
        std: Per-channel standard deviation; None as for ``mean``.

    Raises:
        ValueError: Unknown ``arch`` or weights name.
    """
    from torchvision import models

    check_choice(arch, models.list_models(module=models), name="victim.arch")
    check_int(num_classes, name="victim.num_classes", low=2)
    names = models.get_model_weights(arch).__members__
    chosen = "DEFAULT" if weights is None else str(weights)
    known = names[chosen if chosen in names else "DEFAULT"]
    preset, categories = known.transforms(), known.meta["categories"]
    if chosen in names:
        if num_classes != 1000:
            raise ValueError(f"`victim.num_classes` must be 1000 for torchvision's own weights, got {num_classes}")
        try:
            network = models.get_model(arch, weights=known)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"`victim.weights`: {arch}'s weights {chosen} could not be fetched from {known.url}: {error}. "
                "Download the file in another way and give its path as `victim.weights`"
            ) from error
    else:
        if "." not in chosen and "/" not in chosen and not Path(chosen).is_file():
            raise ValueError(
                f"`victim.weights` for {arch} must be one of {', '.join(names)}, or the path of a state dict, "
                f"got {chosen!r}"
            )
        # Inception and GoogLeNet otherwise warn about their slow initialisation, which is overwritten at once.
        extra: dict[str, Any] = {"init_weights": False} if arch in ("inception_v3", "googlenet") else {}
        network = models.get_model(arch, weights=None, num_classes=num_classes, **extra)
        load_state_dict_strict(network, chosen)
    return Normalised(
        network,
        mean=mean or preset.mean,
        std=std or preset.std,
        classes=categories if num_classes == len(categories) else (),
        size=(preset.crop_size[0], preset.crop_size[0]),
        interpolation=preset.interpolation.value,
    )
