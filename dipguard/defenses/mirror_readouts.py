"""What MirrorGuard's fits leave, and some of it as views for an attacker who knows it."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor

from dipguard.decision.evidence import SHIFTS, mirrored
from dipguard.decision.readout import STITCHED, Readout

MOST = 8
"""Mirrored windows of one image, at most: each costs an attack a look of the victim and its gradient."""


class Readings(NamedTuple):
    """What B images' fits left.

    Attributes:
        samples: Means of x(t) over windows, of all networks, [S, B, 3, H, W].
        straight: The victim's logits on them, [S, B, C].
        turned: Its logits on their mirrored copies, [S, B, C].
        errors: Mean squared error to the given image, mean over each window, [S, B].
        own: The victim's logits on the given images, [B, C].
        seconds: What the victim's readings took.
    """

    samples: Tensor
    straight: Tensor
    turned: Tensor
    errors: Tensor
    own: Tensor
    seconds: float


def mirrored_views(windows: int) -> list[int]:
    """Which of so many windows are shown mirrored: `MOST` of them or fewer, spread evenly, the last one included."""
    count = min(MOST, windows)
    return [(number + 1) * windows // count - 1 for number in range(count)]


def mirror_readouts(
    samples: Tensor, stitched: Tensor, *, networks: int, flip: bool, like: Tensor
) -> dict[str, Readout]:
    """The readouts of one stack.

    Args:
        samples: means of x(t) over windows, of all networks one after the other, [S, B, 3, H, W].
        stitched: the answers, [B, 3, H, W].
        networks: number of networks; S is a multiple of it.
        flip: whether the guard mirrors what it moves.
        like: a tensor of the dtype and on the device that the views shall have.

    Returns:
        ``last``: the last window of each network. ``mean``: the mean of all windows. ``mirrored``: a handful of windows
        spread over all fits, looked at as the evidence is gathered: mirrored and shifted. ``stitched``: the answers.
    """
    each = len(samples) // networks
    ends = samples[each - 1 :: each]
    turned = samples[mirrored_views(len(samples))]
    return {
        "last": Readout(ends.to(like, copy=True)),
        "mean": Readout(samples.mean(dim=0, keepdim=True).to(like)),
        "mirrored": Readout(turned.to(like), partial(mirrored, shift=SHIFTS[0], flip=flip)),
        STITCHED: Readout(stitched[None].to(like)),
    }
