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


def clipped(samples: Tensor, given: Tensor, *, distances: Tensor) -> Tensor:
    """Samples [B, 3, H, W], moved to where no value is further than ``distances`` [B] from the given images' values.

    A perturbation is small in every pixel, so what a reconstruction lost beyond that belongs to the picture. ``given``
    are [B, 3, H, W] in [0, 1], distances at least 0.
    """
    most = distances.to(samples)[:, None, None, None]
    return samples.clamp(given - most, given + most)


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

    :func:`class_scores` of the copies choose a class, and the image is the first of these that there is:

    1. the mean of the samples that the victim reads as this class, which is Eq. 7 over another choice of images (reason
       ``class_scores``);
    2. with ``flip``, the mean of the mirrored copies that it reads as this class; the image comes back mirrored
       (``mirrored_copies``). Copies that were only moved are weak evidence against all samples;
    3. the mean of all samples (``no_sample_of_class``).

    In 1 and 2, a mean that the victim reads as another class gives way to the one of its images that scores highest.

    Args:
        traces: Of images of one size, with ``samples`` and ``mirrored_logits``, S of them, else ValueError.
        own_class_weight: Factor, in [0, 1], of the score of the victim's class of the given image.
        classify: The victim: images [n, 3, H, W] to logits [n, C].
        flip: Whether the copies were mirrored (:func:`mirrored`).
    """
    targets = [_target(trace, own_class_weight=own_class_weight) for trace in traces]
    chosen = [_of_class(trace, target, flip=flip) for trace, target in zip(traces, targets, strict=True)]
    decisions = classify(torch.stack([mean.image for mean, _ in chosen])).argmax(dim=1).tolist()
    made = zip(targets, decisions, chosen, strict=True)
    return [mean if decision == target else best for target, decision, (mean, best) in made]


def _target(trace: DecisionTrace, *, own_class_weight: float) -> int:
    """The class with the highest score."""
    if trace.samples is None or trace.mirrored_logits is None:
        raise ValueError("each trace must hold its `samples` and `mirrored_logits`, got one without")
    scores = class_scores(trace.mirrored_logits, own=trace.given_decision, own_class_weight=own_class_weight)
    return int(scores.argmax())


def _of_class(trace: DecisionTrace, target: int, *, flip: bool) -> tuple[Reconstruction, Reconstruction]:
    """The mean of what is read as a class, and the best of these images."""
    assert trace.samples is not None  # as `_target` has checked
    assert trace.mirrored_logits is not None
    readings = {"class_scores": trace.scores} | ({"mirrored_copies": trace.mirrored_logits} if flip else {})
    found = {reason: logits.argmax(dim=1) == target for reason, logits in readings.items()}
    reason = next((reason for reason, read in found.items() if read.any()), "no_sample_of_class")
    used = torch.nonzero(found[reason]).flatten() if reason in found else torch.arange(len(trace.samples))
    images = mirrored(trace.samples[used], flip=flip) if reason == "mirrored_copies" else trace.samples[used]
    mean = Reconstruction(images.mean(dim=0).clamp(0, 1), reason, used)
    if reason not in readings:
        return mean, mean
    best = int(readings[reason][used].softmax(dim=1)[:, target].argmax())
    return mean, Reconstruction(images[best].clamp(0, 1), reason, used[best : best + 1])
