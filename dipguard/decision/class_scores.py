"""Class scores of a trace, and an image that the victim reads as the class with the highest one.

Ding et al. 2021 look at one decision a reconstruction. Here the victim also reads a mirrored, shifted copy of it: what
is left of a perturbation was made for the pixels where it lay, and has little effect elsewhere, while the object is
still recognised. Figures on tuning images: docs/trials.md.
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


class Averaged(NamedTuple):
    """What :func:`average_target_samples` made of one image's samples."""

    image: Tensor  # [3, H, W] in [0, 1]
    used: int  # number of samples that the victim reads as the target
    beta: float  # size of the step away from the given image; 0 if none was needed, or none helped


def mirrored(images: Tensor, *, shift: tuple[int, int], flip: bool = True) -> Tensor:
    """Images mirrored left to right, then moved by ``shift`` = (dy, dx) pixels; the border is filled by reflection.

    Args:
        images: [n, 3, H, W].
        shift: Towards the lower right if positive; each smaller than the side in size, else ValueError.
        flip: Mirror them. False only moves them, for images that mean something else in a mirror.
    """
    dy, dx = shift
    height, width = images.shape[-2:]
    check_int(abs(dy), name="shift", low=0, high=height - 1)
    check_int(abs(dx), name="shift", low=0, high=width - 1)
    border = (max(dx, 0), max(-dx, 0), max(dy, 0), max(-dy, 0))
    padded = F.pad(images.flip(-1) if flip else images, border, mode="reflect")
    top, left = max(-dy, 0), max(-dx, 0)
    return padded[..., top : top + height, left : left + width]


def class_scores(logits: Tensor, *, own: Tensor | None = None, own_class_weight: float = 1.0) -> Tensor:
    """Mean over S readings of the victim's class probabilities; the given image's own class counts less.

    If the image was attacked, the attacker has chosen that class, and a part of the perturbation is left in every x(t).

    Args:
        logits: [S, B, C], at least one reading.
        own: The victim's decisions on the given images, [B]; None weighs all classes alike.
        own_class_weight: Factor of that class's probability, in [0, 1].

    Returns:
        [B, C].

    Raises:
        ValueError: No readings, or ``own_class_weight`` out of range.
    """
    check_float(own_class_weight, name="own_class_weight", low=0.0, high=1.0)
    if len(logits) == 0:
        raise ValueError("`logits` must hold at least one reading, got none")
    mean = logits.softmax(dim=-1).mean(dim=0)
    if own is None:
        return mean
    mine = torch.zeros_like(mean, dtype=torch.bool).scatter(1, own.to(mean.device)[:, None], True)
    return torch.where(mine, mean * own_class_weight, mean)


def average_target_samples(
    samples: Tensor,
    decisions: Tensor,
    given: Tensor,
    *,
    target: int,
    classify: Callable[[Tensor], Tensor],
    betas: Sequence[float],
) -> Averaged:
    """An image that the victim reads as ``target``: the mean of the samples that it reads so.

    That is Eq. 7 over another choice of images. If the mean is not read as ``target``, or no sample is, the mean (then
    that of all samples) is pushed away from the given image by Eq. 6, by the smallest of ``betas`` for which the victim
    reads ``target``; if there is none, it stays where it was.

    Args:
        samples: x(t), [S, 3, H, W] in [0, 1].
        decisions: The victim's decisions on them, [S].
        given: x0, [3, H, W].
        target: The class that the image is to have.
        classify: The victim: images [n, 3, H, W] to logits [n, C].
        betas: Step sizes to try, increasing, each at least 0.

    Raises:
        ValueError: No samples, or a negative step.
    """
    if len(samples) == 0:
        raise ValueError("`samples` must hold at least one image, got none")
    chosen = decisions == target
    found = int(chosen.sum())
    image = samples[chosen].mean(dim=0) if found else samples.mean(dim=0)
    steps = [check_float(beta, name="betas", low=0.0) for beta in betas]
    image = image.clamp(0, 1)
    # Nearly all means are read as the target at once: then the steps need not be classified.
    if int(classify(image[None]).argmax()) == target or not steps:
        return Averaged(image, found, 0.0)
    tried = torch.cat([on_manifold(image[None], given, beta=beta) for beta in steps]).clamp(0, 1)
    right = torch.nonzero(classify(tried).argmax(dim=1) == target).flatten().tolist()
    return Averaged(tried[right[0]], found, steps[right[0]]) if right else Averaged(image, found, 0.0)


def stitch_mirrored(
    trace: DecisionTrace, *, own_class_weight: float, classify: Callable[[Tensor], Tensor], betas: Sequence[float]
) -> Reconstruction:
    """Rebuild one image from its trace, as the class that scores highest on the mirrored copies of its samples.

    :func:`class_scores` with ``own_class_weight`` chooses the class, :func:`average_target_samples` makes the image.

    Returns:
        With the reason ``class_scores``, or ``no_sample_of_class`` if the victim reads no sample as the target, so that
        the mean of all was taken; ``used`` are the positions of the samples that were averaged.

    Raises:
        ValueError: The trace lacks what is needed, or an option is out of range.
    """
    if trace.samples is None or trace.mirrored_logits is None:
        raise ValueError("`trace` must hold its `samples` and `mirrored_logits`, got a trace without")
    own, logits = torch.tensor([trace.given_decision]), trace.mirrored_logits[:, None]
    target = int(class_scores(logits, own=own, own_class_weight=own_class_weight).argmax())
    made = average_target_samples(
        trace.samples, trace.decisions, trace.given, target=target, classify=classify, betas=betas
    )
    used = torch.nonzero(trace.decisions == target).flatten()
    return Reconstruction(made.image, "class_scores" if made.used else "no_sample_of_class", used)
