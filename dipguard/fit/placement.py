"""Where a fit runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dipguard.classifier import device_of

ACCELERATORS = ("auto", "cpu", "gpu")
"""``auto`` is where the victim is."""


def fit_device(accelerator: str, *, victim: nn.Module, images: Tensor) -> torch.device:
    """The device of a fit; one of ``ACCELERATORS`` says which.

    Raises:
        ValueError: ``gpu`` on a machine without one.
    """
    if accelerator == "cpu":
        return torch.device("cpu")
    if accelerator == "gpu":
        if not torch.cuda.is_available():
            raise ValueError("`accelerator` must be 'cpu' or 'auto' on a machine without a GPU, got 'gpu'")
        return images.device if images.device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    device = device_of(victim, images.device)
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")
