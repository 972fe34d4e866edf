"""Class scores of a trace, and an image that the victim reads as the class with the highest one.

Ding et al. 2021 look at one decision a reconstruction. Here the victim also reads a mirrored, shifted copy of it: what
is left of a perturbation was made for the pixels where it lay, and has little effect elsewhere, while the object is
still recognised. Figures on tuning images: docs/trials.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dipguard.checks import check_float
from dipguard.decision.stitching import Reconstruction
from dipguard.decision.trace import DecisionTrace


def mirrored(images: Tensor, *, flip: bool = True) -> Tensor:
    """Images [n, 3, H, W] mirrored left to right, and moved to the right by a 32nd of their width, at least 2 pixels.

    The border is filled by reflection. Without ``flip`` they are only moved: some images mean something else in a
    mirror.
    """
    width = images.shape[-1]
    padded = F.pad(images.flip(-1) if flip else images, (max(2, width // 32), 0, 0, 0), mode="reflect")
    return padded[..., :width]


def class_scores(logits: Tensor, *, own: int, own_class_weight: float) -> Tensor:
    """Mean over S readings of the victim's class probabilities, [C]; the given image's own class counts less.

    If the image was attacked, the attacker has chosen that class, and a part of the perturbation is left in every x(t).

    Args:
        logits: [S, C]; ValueError for S = 0.
        own: The victim's decision on the given image.
        own_class_weight: Factor of that class's probability, in [0, 1], else ValueError.
    """
    check_float(own_class_weight, name="own_class_weight", low=0.0, high=1.0)
    if len(logits) == 0:
        raise ValueError("`logits` must hold at least one reading, got none")
    mean = logits.softmax(dim=-1).mean(dim=0)
    mean[own] *= own_class_weight
    return mean


def stitch_mirrored(
    traces: Sequence[DecisionTrace],
    *,
    own_class_weight: float,
    classify: Callable[[Tensor], Tensor],
    flip: bool = True,
) -> list[Reconstruction]:
    """Rebuild B images from their traces, each as the class that scores highest on the mirrored copies of its samples.

    :func:`class_scores` chooses the class. The image is the mean of the samples that the victim reads as this class:
    Eq. 7 over another choice of images. If it reads none so, it is the mean of their mirrored copies that it reads so;
    a mean that the victim reads otherwise gives way to the one of its images that scores highest. If it reads none of
    the copies so either, or they were only moved, which is weak evidence against all direct readings, it is the mean of
    all samples. The reasons are ``class_scores``, ``mirrored_copies`` (the image is mirrored) and
    ``no_sample_of_class``.

    Args:
        traces: Of images of one size, with ``samples`` and ``mirrored_logits``, S of them, else ValueError.
        own_class_weight: Factor, in [0, 1], of the score of the victim's class of the given image.
        classify: The victim: images [n, 3, H, W] to logits [n, C].
        flip: Whether the copies were mirrored (:func:`mirrored`).
    """
    chosen = [_of_class(trace, own_class_weight=own_class_weight, flip=flip) for trace in traces]
    read = classify(torch.stack([mean.image for _, mean, _ in chosen])).argmax(dim=1).tolist()
    return [mean if decision == target else best for (target, mean, best), decision in zip(chosen, read, strict=True)]


def _of_class(
    trace: DecisionTrace, *, own_class_weight: float, flip: bool
) -> tuple[int, Reconstruction, Reconstruction]:
    """The class with the highest score, the mean of what is read as it, and the best of these images."""
    if trace.samples is None or trace.mirrored_logits is None:
        raise ValueError("each trace must hold its `samples` and `mirrored_logits`, got one without")
    own = trace.given_decision
    scores = class_scores(trace.mirrored_logits, own=own, own_class_weight=own_class_weight)
    target = int(scores.argmax())
    readings = {"class_scores": trace.scores} | ({"mirrored_copies": trace.mirrored_logits} if flip else {})
    found = {reason: logits.argmax(dim=1) == target for reason, logits in readings.items()}
    reason = next((reason for reason, read in found.items() if read.any()), "no_sample_of_class")
    used = torch.nonzero(found[reason]).flatten() if reason in found else torch.arange(len(trace.samples))
    images = mirrored(trace.samples[used], flip=flip) if reason == "mirrored_copies" else trace.samples[used]
    mean = Reconstruction(images.mean(dim=0).clamp(0, 1), reason, used)
    if reason not in readings:
        return target, mean, mean
    best = int(readings[reason][used].softmax(dim=1)[:, target].argmax())
    return target, mean, Reconstruction(images[best].clamp(0, 1), reason, used[best : best + 1])
