"""Which class a trace speaks for, and an image that the victim reads as that class.

Ding et al. 2021 look at one decision a reconstruction. Here the victim also reads a mirrored, shifted copy of it: what
is left of a perturbation was made for the pixels where it lay, and says little when it lies elsewhere, while the object
is still there. Figures on tuning images: docs/trials.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dipguard.checks import check_float, check_int
from dipguard.decision.stitching import Reconstruction, on_manifold
from dipguard.decision.trace import DecisionTrace

SHIFTS = ((0, 2),)
"""Shifts (dy, dx) in pixels of the mirrored copies, taken in turn from sample to sample."""


class Stitched(NamedTuple):
    """What :func:`stitch_readers` made of one image's samples.

    Attributes:
        image: [3, H, W] in [0, 1].
        target: The class that the samples speak for.
        readers: Number of samples that the victim reads as that class.
        beta: Size of the step away from the given image; 0 where none was needed, or none helped.
    """

    image: Tensor
    target: int
    readers: int
    beta: float


def mirrored(images: Tensor, *, shift: tuple[int, int], flip: bool = True) -> Tensor:
    """Images mirrored left to right, then moved by ``shift`` = (dy, dx) pixels; reflection fills what becomes free.

    Args:
        images: [n, 3, H, W].
        shift: Towards the lower right where positive; each less than the side in size.
        flip: Mirror them; False only moves them, for pictures that mean something else in a mirror.

    Returns:
        The same shape.

    Raises:
        ValueError: A shift as large as the image.
    """
    dy, dx = shift
    height, width = images.shape[-2:]
    check_int(abs(dy), name="shift", low=0, high=height - 1)
    check_int(abs(dx), name="shift", low=0, high=width - 1)
    border = (max(dx, 0), max(-dx, 0), max(dy, 0), max(-dy, 0))
    padded = F.pad(images.flip(-1) if flip else images, border, mode="reflect")
    top, left = max(-dy, 0), max(-dx, 0)
    return padded[..., top : top + height, left : left + width]


def evidence(logits: Tensor, *, own: Tensor | None = None, trust: float = 1.0) -> Tensor:
    """Mean over S readings of the victim's class probabilities; the given image's own class counts less.

    An attacker has chosen that class, where there was one, and a part of the perturbation is left in every x(t).

    Args:
        logits: [S, B, C], at least one reading.
        own: The victim's decisions on the given images, [B]; None weighs all classes alike.
        trust: What the probability of that class is multiplied by, in [0, 1].

    Returns:
        [B, C].

    Raises:
        ValueError: No readings, or ``trust`` out of range.
    """
    check_float(trust, name="trust", low=0.0, high=1.0)
    if len(logits) == 0:
        raise ValueError("`logits` must hold at least one reading, got none")
    mean = logits.softmax(dim=-1).mean(dim=0)
    if own is None:
        return mean
    mine = torch.zeros_like(mean, dtype=torch.bool).scatter(1, own.to(mean.device)[:, None], True)
    return torch.where(mine, mean * trust, mean)


def stitch_readers(
    samples: Tensor,
    decisions: Tensor,
    given: Tensor,
    *,
    target: int,
    classify: Callable[[Tensor], Tensor],
    betas: Sequence[float],
) -> Stitched:
    """An image that the victim reads as ``target``: the mean of the samples that it reads so.

    That is Eq. 7 over another choice of images. Where the mean is not read as ``target``, or no sample is, it (or the
    mean of all samples) is pushed away from the given image by Eq. 6, by the smallest ``betas`` for which the victim
    changes its mind; if none does, it stays where it was.

    Args:
        samples: x(t), [S, 3, H, W] in [0, 1].
        decisions: The victim's decisions on them, [S].
        given: x0, [3, H, W].
        target: The class that the samples speak for.
        classify: The victim: images [n, 3, H, W] to logits [n, C].
        betas: Step sizes to try, increasing, each at least 0.

    Raises:
        ValueError: No samples, or a negative step.
    """
    if len(samples) == 0:
        raise ValueError("`samples` must hold at least one image, got none")
    readers = decisions == target
    count = int(readers.sum())
    image = samples[readers].mean(dim=0) if count else samples.mean(dim=0)
    steps = [check_float(beta, name="betas", low=0.0) for beta in betas]
    image = image.clamp(0, 1)
    # Nearly all means are read as they should be: one question then, not one a step.
    if int(classify(image[None]).argmax()) == target or not steps:
        return Stitched(image, target, count, 0.0)
    tried = torch.cat([on_manifold(image[None], given, beta=beta) for beta in steps]).clamp(0, 1)
    right = torch.nonzero(classify(tried).argmax(dim=1) == target).flatten().tolist()
    return Stitched(tried[right[0]], target, count, steps[right[0]]) if right else Stitched(image, target, count, 0.0)


def stitch_readings(
    samples: Tensor,
    straight: Tensor,
    turned: Tensor,
    given: Tensor,
    *,
    own: int,
    trust: float,
    classify: Callable[[Tensor], Tensor],
    betas: Sequence[float],
) -> Stitched:
    """An image of the class that the mirrored readings speak for: :func:`evidence`, then :func:`stitch_readers`.

    Args:
        samples: x(t), [S, 3, H, W] in [0, 1].
        straight: The victim's logits on them, [S, C].
        turned: Its logits on their mirrored copies, [S, C].
        given: x0, [3, H, W].
        own: The victim's decision on it.
        trust: See :func:`evidence`.
        classify: See :func:`stitch_readers`.
        betas: See :func:`stitch_readers`.

    Raises:
        ValueError: No samples, or an option out of range.
    """
    spoken = evidence(turned[:, None], own=torch.tensor([own]), trust=trust)
    return stitch_readers(
        samples, straight.argmax(dim=-1), given, target=int(spoken.argmax()), classify=classify, betas=betas
    )


def stitch_evidence(
    trace: DecisionTrace, *, trust: float, classify: Callable[[Tensor], Tensor], betas: Sequence[float]
) -> Reconstruction:
    """Rebuild one image from its trace, by :func:`stitch_readings`.

    Args:
        trace: It must hold ``samples`` and ``turned``.
        trust: See :func:`stitch_readings`.
        classify: See :func:`stitch_readings`.
        betas: See :func:`stitch_readings`.

    Returns:
        With the reason ``evidence``, or ``no_reader`` where no sample is read as the target, so that the mean of all
        was taken; ``used`` are the positions of the samples that were averaged.

    Raises:
        ValueError: The trace lacks what is needed, or an option is out of range.
    """
    if trace.samples is None or trace.turned is None:
        raise ValueError(
            "`trace` must hold its samples and readings of their mirrored copies (`turned`), got a trace without"
        )
    made = stitch_readings(
        trace.samples,
        trace.scores,
        trace.turned,
        trace.given,
        own=trace.given_decision,
        trust=trust,
        classify=classify,
        betas=betas,
    )
    used = torch.nonzero(trace.decisions == made.target).flatten()
    return Reconstruction(made.image, "evidence" if made.readers else "no_reader", used)
