"""The attack libraries, imported when an attack needs them, and the victim as they see it.

Some views give the victim a gradient where it has none: a confident victim must not be mistaken for a robust one.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dipguard.classifier import logits_of, reference_of
from dipguard.registry import import_extra


def load_library(name: str) -> Any:
    """Import the library called ``name``; the ImportError says which extra brings it."""
    # foolbox imports GitPython for its model zoo, which raises where there is no git program unless it is told not to.
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    return import_extra(name, owner="this attack", extra="attacks")


torchattacks = partial(load_library, "torchattacks")  # Kim 2020
foolbox = partial(load_library, "foolbox")  # Rauber et al. 2020


class VictimView(nn.Module):
    """The victim as a library sees it: the library can neither switch its mode nor guess a wrong device."""

    def __init__(self, victim: nn.Module) -> None:
        super().__init__()
        # torchattacks takes the first parameter's device, and prints a complaint where there is none.
        reference = reference_of(victim, torch.empty(0, device="cpu"))
        self.device_marker = nn.Parameter(reference.new_empty(0), requires_grad=False)
        self.victim = victim
        self.eval()

    def train(self, mode: bool = True) -> VictimView:
        """Switch this module alone."""
        self.training = mode
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return the victim's logits [B, C]."""
        return logits_of(self.victim, images)


class LogitsAboveZero(VictimView):
    """The victim with a constant added to each image's logits, so that the lowest is 0; decisions and margins stay.

    torchattacks' C&W takes the largest other logit as the maximum of logits with the true class's set to 0, which is
    wrong where all others are negative.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Return the shifted logits [B, C]."""
        logits = super().forward(images)
        return logits - logits.detach().amin(dim=1, keepdim=True)


def unsaturated(logits: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Logits [B, C] with a gradient where that of cross-entropy has underflowed in the victim's ``dtype``.

    At a margin of about 40 the loss is 0 in float32, and so is its gradient. There the gradient by the logits becomes
    the direction that it tends to as the margin grows: up for the second class, down for the top class.
    """
    if logits.requires_grad:
        top = logits.detach().topk(2, dim=1).indices
        # A gradient below the floor would vanish on the way down to the pixels; raised to the floor, it does not.
        floor = torch.finfo(dtype).tiny ** 0.5
        logits.register_hook(lambda gradient: _limit_where_underflown(gradient, top, floor))
    return logits


class Unsaturated(VictimView):
    """The victim with `unsaturated` logits."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the victim's logits [B, C]."""
        return unsaturated(super().forward(images), dtype=self.device_marker.dtype)


class NeverFlat(Unsaturated):
    """An `Unsaturated` victim; where its gradient by an image is exactly zero, it is noise (as in foolbox's DDN)."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the victim's logits [B, C]."""
        if images.requires_grad:
            images = images.view_as(images)
            images.register_hook(_noise_where_flat)
        return super().forward(images)


def _limit_where_underflown(gradient: Tensor, top: Tensor, floor: float) -> Tensor:
    peak = gradient.abs().amax(dim=1, keepdim=True)
    limit = torch.zeros_like(gradient).scatter(1, top[:, 1:], floor).scatter(1, top[:, :1], -floor)
    lost = gradient.gather(1, top[:, :1]) == 0  # the top class's share, p - 1, was rounded away, if not all of it
    raised = torch.where(lost, limit, gradient * (floor / peak))
    return torch.where(peak < floor, raised, gradient)


def _noise_where_flat(gradient: Tensor) -> Tensor:
    flat = (gradient == 0).flatten(1).all(dim=1)
    return torch.where(flat.view(-1, 1, 1, 1), torch.randn_like(gradient), gradient) if flat.any() else gradient
