"""The attack libraries, imported when an attack needs them, and the victim as they see it."""

from __future__ import annotations

import os
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from dipguard.classifier import device_of


def load_library(name: str, *, user: str = "this attack", extra: str = "attacks") -> Any:
    """Import the library called ``name``; the ImportError says what ``user`` needs it, and which extra brings it."""
    # foolbox imports GitPython for its model zoo, which raises where there is no git program unless it is told not to.
    told = "GIT_PYTHON_REFRESH" in os.environ
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{user} needs the library {name}, which could not be imported ({error}): pip install 'dipguard[{extra}]'"
        ) from error
    finally:
        if not told:
            del os.environ["GIT_PYTHON_REFRESH"]


torchattacks = partial(load_library, "torchattacks")
"""Imports torchattacks (Kim 2020)."""
foolbox = partial(load_library, "foolbox")
"""Imports foolbox (Rauber et al. 2020)."""


class VictimView(nn.Module):
    """The victim as a library sees it: the library can neither switch its mode nor guess a wrong device."""

    def __init__(self, victim: nn.Module) -> None:
        super().__init__()
        # torchattacks takes the first parameter's device, and prints a complaint where there is none.
        self.device_marker = nn.Parameter(torch.empty(0, device=device_of(victim)), requires_grad=False)
        self.victim = victim
        self.eval()

    def train(self, mode: bool = True) -> VictimView:
        """Switch this module alone."""
        self.training = mode
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return the victim's logits [B, C]."""
        logits: Tensor = self.victim(images)
        return logits
