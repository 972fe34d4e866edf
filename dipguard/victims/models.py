"""Victims from model objects: normalisation, size and class names from the configuration of their library."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from dipguard.victims import huggingface_models, timm_models, torchvision_models
from dipguard.victims.base import Channels, Normalised
from dipguard.victims.weights import load_state_dict_strict


def of_model(
    model: nn.Module,
    *,
    weights: str | Path | None = None,
    mean: Channels = None,
    std: Channels = None,
    size: int | None = None,
) -> Normalised:
    """A model as a victim, out of the wrapper of torch.compile or DataParallel; ``size`` is the side of its input."""
    network = getattr(model, "_orig_mod", model)
    network = network.module if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else network
    victim = network if isinstance(network, Normalised) else None
    if weights is not None:
        load_state_dict_strict(network if victim is None else victim.network, weights)
    libraries = {kind.__module__.partition(".")[0] for kind in type(network).__mro__}
    if "timm" in libraries:
        victim = timm_models.of_model(network, mean=mean, std=std)
    elif "transformers" in libraries:
        victim = huggingface_models.of_model(network, mean=mean, std=std, size=size)
    elif "torchvision" in libraries:
        victim = torchvision_models.of_model(network, mean=mean, std=std)
    if victim is None:
        if mean is None or std is None:
            problem = f"a {type(network).__name__} does not say how its images are normalised"
            advice = "give `mean` and `std` (0, 0, 0 and 1, 1, 1 for images in [0, 1])"
            raise ValueError(f"`name`: {problem}: {advice}")
        victim = Normalised(network, mean=mean, std=std)
    victim.size = victim.size if size is None else (size, size)
    return victim
