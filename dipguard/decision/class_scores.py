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


def cleanness(noise: float, *, limits: Sequence[float]) -> float:
    """Return 1 for noise up to ``limits[0]``, 0 from ``limits[1]`` on, and in between what lies on the line.

    ``noise`` is that of the given image (:func:`~dipguard.decision.quality.image_noise`), in the unit of the limits, of
    which the lower one comes first.
    """
    low, high = limits
    return min(max((high - noise) / (high - low), 0.0), 1.0)


def window_weights(steps: Tensor, *, share: float, early: int, late: int) -> Tensor:
    """Weights of the windows of one fit: of a noisy image the early ones count, of a clean one the late ones.

    A deep image prior takes up the image first and the perturbation later. The mean of the windows that end before step
    ``early`` and the mean of those that begin at step ``late`` or after it are mixed. Returns [S], at least 0, with the
    sum 1.

    Args:
        steps: Last step of each window, [S]; windows have equal lengths.
        share: Share of the late windows, from 0 to 1 (`cleanness`).
        early: A window is early if its last step is below this; the first window always is.
        late: A window is late if its first step is at least this; the last window always is.
    """
    length = int(steps[1] - steps[0]) if len(steps) > 1 else 1
    is_early, is_late = steps < early, steps - length + 1 >= late
    is_early[0] = is_late[-1] = True
    return (1 - share) * is_early.double() / is_early.sum() + share * is_late.double() / is_late.sum()


def class_scores(logits: Tensor, *, weights: Tensor, own: int, own_class_weight: float) -> Tensor:
    """Weighted mean over S readings of the victim's class probabilities, [C]; the given image's own class counts less.

    If the image was attacked, the attacker has chosen that class, and a part of the perturbation is left in every x(t).

    Args:
        logits: [S, C]; ValueError for S = 0.
        weights: Of the readings, [S], at least 0, with the sum 1.
        own: The victim's decision on the given image.
        own_class_weight: Factor of that class's probability, in [0, 1], else ValueError.
    """
    check_float(own_class_weight, name="own_class_weight", low=0.0, high=1.0)
    if len(logits) == 0:
        raise ValueError("`logits` must hold at least one reading, got none")
    mean = weights.to(logits.dtype) @ logits.softmax(dim=-1)
    mean[own] *= own_class_weight
    return mean


def stitch_mirrored(
    traces: Sequence[DecisionTrace],
    *,
    weights: Sequence[Tensor],
    own_class_weight: float,
    given_weights: Sequence[float],
    classify: Callable[[Tensor], Tensor],
    flip: bool = True,
) -> list[Reconstruction]:
    """Rebuild B images from their traces, each as the class that scores highest on the mirrored copies of its samples.

    :func:`class_scores` of the samples' copies and of the given image's own copy choose a class, and the image is the
    first of these that there is:

    1. the weighted mean of the samples that the victim reads as this class, which is Eq. 7 over another choice of
       images (reason ``class_scores``);
    2. with ``flip``, the weighted mean of the mirrored copies that it reads as this class; the image comes back
       mirrored (``mirrored_copies``). Copies that were only moved are weak evidence against all samples;
    3. the weighted mean of all samples (``no_sample_of_class``).

    In 1 and 2, a mean that the victim reads as another class gives way to the one of its images that scores highest.
    Samples of weight 0 take no part.

    Args:
        traces: Of images of one size, with ``samples`` and ``mirrored_logits``, S of them, else ValueError.
        weights: Of each trace's samples, [S], at least 0, with the sum 1 (:func:`window_weights`).
        own_class_weight: Factor, in [0, 1], of the score of the victim's class of the given image.
        given_weights: Weight of the given image's copy among the readings of each trace, from 0 to 1; those of the
            samples have the rest.
        classify: The victim: images [n, 3, H, W] to logits [n, C].
        flip: Whether the copies were mirrored (:func:`mirrored`).
    """
    copies: Sequence[Tensor | None] = [None] * len(traces)
    if any(given_weights):
        copies = classify(mirrored(torch.stack([trace.given for trace in traces]), flip=flip))[:, None].unbind()
    each = zip(traces, weights, copies, given_weights, strict=True)
    targets = [_target(*one, own_class_weight=own_class_weight) for one in each]
    chosen = [_of_class(*one, flip=flip) for one in zip(traces, weights, targets, strict=True)]
    decisions = classify(torch.stack([mean.image for mean, _ in chosen])).argmax(dim=1).tolist()
    made = zip(targets, decisions, chosen, strict=True)
    return [mean if decision == target else best for target, decision, (mean, best) in made]


def _target(
    trace: DecisionTrace, weights: Tensor, copy: Tensor | None, share: float, *, own_class_weight: float
) -> int:
    """The class with the highest score; ``copy`` [1, C] is the reading of the given image's copy."""
    if trace.samples is None or trace.mirrored_logits is None:
        raise ValueError("each trace must hold its `samples` and `mirrored_logits`, got one without")
    logits = trace.mirrored_logits
    if copy is not None:
        logits = torch.cat([logits, copy.to(logits)])
        weights = torch.cat([(1 - share) * weights, weights.new_tensor([share])])
    own = trace.given_decision
    return int(class_scores(logits, weights=weights, own=own, own_class_weight=own_class_weight).argmax())


def _of_class(
    trace: DecisionTrace, weights: Tensor, target: int, *, flip: bool
) -> tuple[Reconstruction, Reconstruction]:
    """The mean of what is read as a class, and the best of these images."""
    assert trace.samples is not None  # as `_target` has checked
    assert trace.mirrored_logits is not None
    readings = {"class_scores": trace.scores} | ({"mirrored_copies": trace.mirrored_logits} if flip else {})
    found = {reason: (logits.argmax(dim=1) == target) & (weights > 0) for reason, logits in readings.items()}
    reason = next((reason for reason, read in found.items() if read.any()), "no_sample_of_class")
    used = torch.nonzero(found.get(reason, weights > 0)).flatten()
    images = mirrored(trace.samples[used], flip=flip) if reason == "mirrored_copies" else trace.samples[used]
    share = (weights[used] / weights[used].sum()).to(images.dtype)
    mean = Reconstruction(torch.einsum("s,schw->chw", share, images).clamp(0, 1), reason, used)
    if reason not in readings:
        return mean, mean
    best = int(readings[reason][used].softmax(dim=1)[:, target].argmax())
    return mean, Reconstruction(images[best].clamp(0, 1), reason, used[best : best + 1])
