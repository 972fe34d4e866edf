"""The victim with a gradient where its cross-entropy has none: a confident victim must not look like a robust one."""

from __future__ import annotations

import torch
from torch import Tensor

from dipguard.attacks.libraries import VictimView


class Unsaturated(VictimView):
    """The victim with a gradient where cross-entropy's has underflowed; all other gradients, and the logits, stay.

    At a margin of some 40 the loss is 0 in float32 and so is its gradient: steps along its sign do not move the image,
    and the victim seems robust because it is sure. The logits' gradient then gets the direction that it tends to as the
    margin grows: up for the best rival, down for the top class.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Return the victim's logits [B, C]."""
        logits = super().forward(images)
        if logits.requires_grad:
            top = logits.detach().topk(2, dim=1).indices
            logits.register_hook(lambda gradient: _limit_where_underflown(gradient, top))
        return logits


class NeverFlat(Unsaturated):
    """As `Unsaturated`; an image whose own gradient is exactly zero all the same gets noise instead.

    There the victim is flat, and noise (as in foolbox's DDN) is the only way off the plateau.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Return the victim's logits [B, C]."""
        if not images.requires_grad:
            return super().forward(images)
        seen = images.view_as(images)
        seen.register_hook(_noise_where_flat)
        return super().forward(seen)


def _limit_where_underflown(gradient: Tensor, top: Tensor) -> Tensor:
    # A row below the floor would not survive the way down to the pixels; one at the floor does.
    floor = torch.finfo(gradient.dtype).tiny ** 0.5
    limit = torch.zeros_like(gradient).scatter(1, top[:, 1:], floor).scatter(1, top[:, :1], -floor)
    return torch.where(gradient.abs().amax(dim=1, keepdim=True) < floor, limit, gradient)


def _noise_where_flat(gradient: Tensor) -> Tensor:
    flat = (gradient == 0).flatten(1).all(dim=1)
    if not bool(flat.any()):
        return gradient
    return torch.where(flat.view(-1, 1, 1, 1), torch.randn_like(gradient), gradient)
