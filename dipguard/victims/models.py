"""Victims from model objects: normalisation, size and class names from the configuration of their library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from dipguard.victims import huggingface_models, timm_models, torchvision_models
from dipguard.victims.base import Normalised
from dipguard.victims.weights import load_state_dict_strict


def of_model(
    model: nn.Module,
    *,
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
) -> Normalised:
    """A model of timm, torchvision or transformers as a victim; any other one with ``mean`` and ``std``.

    It is taken out of the wrapper of torch.compile or DataParallel.

    Args:
        model: Takes normalised images; a `Normalised` stays what it is.
        weights: Path or https address of a state dict; None keeps the model's.
        mean: Per-channel mean; None takes the model's own.
        std: Per-channel standard deviation; None as for ``mean``.
        size: Side in pixels of the square input; None takes the model's own.
    """
    network = getattr(model, "_orig_mod", model)
    network = network.module if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else network
    inner = network.network if isinstance(network, Normalised) else network
    if weights is not None:
        load_state_dict_strict(inner, weights)
    libraries = {kind.__module__.partition(".")[0] for kind in type(network).__mro__}
    victim: Normalised | None = None
    if isinstance(network, Normalised):
        victim = network
    elif "timm" in libraries:
        victim = timm_models.of_model(network, mean=mean, std=std)
    elif "transformers" in libraries:
        victim = huggingface_models.of_model(network, mean=mean, std=std, size=size)
    elif "torchvision" in libraries:
        victim = torchvision_models.of_model(network, mean=mean, std=std)
    if victim is None and mean is not None and std is not None:
        victim = Normalised(network, mean=mean, std=std)
    if victim is None:
        raise ValueError(
            f"`name`: a {type(network).__name__} does not say how its images are normalised: give `mean` and `std` "
            "(0, 0, 0 and 1, 1, 1 for images in [0, 1])"
        )
    victim.size = victim.size if size is None else (size, size)
    return victim
