"""A copy of the victim that reads faster: normalisations as part of convolutions, and products in bfloat16."""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, nn

from dipguard.fit.decider import Decider

_log = logging.getLogger(__name__)
VICTIM_SPEEDS = ("as_is", "folded", "bfloat16")
NEAR = 1e-3
"""Largest difference of a folded victim's logits from its own, relative to its largest logit; rounding gives 1e-5."""
HALF_NEAR = 0.1
"""The same for a victim whose products have 8 bits: a ResNet-56 for CIFAR differs by 0.01 to 0.03."""
PROBES = 8


def faster(victim: nn.Module, images: Tensor, *, speed: str) -> nn.Module:
    """Who reads along a fit: the victim, or a faster copy of it.

    Args:
        victim: Takes [n, 3, H, W] in [0, 1], returns logits [n, C]. Never changed.
        images: Some of those that it will read, [n, 3, H, W].
        speed: ``as_is``; ``folded`` (:func:`folded`); or ``bfloat16``, the folded copy with its products in bfloat16,
            which decides otherwise where two classes are nearly equal.
    """
    if speed == "as_is":
        return victim
    copied = folded(victim, images)
    return copied if speed == "folded" else _in_bfloat16(copied, images)


def _in_bfloat16(victim: nn.Module, images: Tensor) -> nn.Module:
    made = _Half(victim)
    ours, theirs = Decider(made)(images[:PROBES]), Decider(victim)(images[:PROBES])
    off = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))
    if not off <= HALF_NEAR:
        _log.warning(
            "the victim's logits in bfloat16 differ by %.1e of the largest: it is asked in its own format", off
        )
        return victim
    return made


class _Half(nn.Module):
    """A victim whose products are taken in bfloat16."""

    def __init__(self, victim: nn.Module) -> None:
        super().__init__()
        self.victim = victim

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            logits: Tensor = self.victim(images)
        return logits.float()


def folded(victim: nn.Module, images: Tensor) -> nn.Module:
    """The victim with each BatchNorm folded into the convolution before it; the victim itself where that cannot be.

    In eval mode such a pair is one affine map, so that only rounding differs. The network is traced and rewritten by
    ``torch.fx``, on a copy. It is then checked on some images: the logits must be near the victim's own, the decisions
    the same. What cannot be traced, or fails the check, is logged and left as it is.

    Args:
        victim: Takes [n, 3, H, W] in [0, 1], returns logits [n, C]. Never changed.
        images: Some of those that it will read, [n, 3, H, W].
    """
    from torch.fx.experimental.optimization import fuse

    probes = images[:PROBES]
    try:
        with torch.inference_mode(False), torch.no_grad():
            made: nn.Module = fuse(copy.deepcopy(victim).eval())
            ours, theirs = Decider(made)(probes), Decider(victim)(probes)
    except Exception as error:  # somebody else's code is run in ways that it was not written for: anything may come
        _log.warning("the victim cannot be folded, and is asked as it is: %s: %s", type(error).__name__, error)
        return victim
    off = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))
    if not off <= NEAR or not torch.equal(ours.argmax(1), theirs.argmax(1)):
        _log.warning("the folded victim's logits differ by %.1e of the largest: it is asked as it is", off)
        return victim
    return made
