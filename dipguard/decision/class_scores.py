"""Class scores of a trace, and an image that the victim reads as the class with the highest one.

Ding et al. 2021 look at one decision per reconstruction. Here the victim also classifies a mirrored, shifted copy of
it: what is left of a perturbation was made for the pixels where it lay, and has little effect elsewhere, while the
object is still recognised. And the probabilities on shifted copies of the given image are compared with those on the
image itself, where an attack must have made the true class unlikely. Figures on tuning images: docs/trials.md.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dipguard.checks import check_float
from dipguard.classifier import Decider, device_of, is_out_of_memory
from dipguard.decision.stitching import Reconstruction
from dipguard.decision.trace import DecisionTrace
from dipguard.precision import widest

STEP = 0.5 / 255
MOST_STEPS = 16
"""Size of a step of `moved`, and how many there are at most."""
SURE = 0.9
"""The probability at which `moved` ends. At a lower one, rounding to 8 bits could change the decision again."""


def mirrored(images: Tensor, *, flip: bool = True) -> Tensor:
    """Images [n, 3, H, W] mirrored left to right, and moved to the right by a 32nd of their width, at least 2 pixels.

    The border is filled by reflection. Without ``flip`` they are only moved: some images mean something else in a
    mirror.
    """
    width = images.shape[-1]
    padded = F.pad(images.flip(-1) if flip else images, (max(2, width // 32), 0, 0, 0), mode="reflect")
    return padded[..., :width]


def shifted(images: Tensor) -> Tensor:
    """Images [n, 3, H, W] moved right, left, down and up, [4, n, 3, H, W].

    By a 32nd of their width, at least 3 pixels; the border is filled by reflection.
    """
    height, width = images.shape[-2:]
    s = min(max(3, width // 32), height - 1, width - 1)
    padded = F.pad(images, (s, s, s, s), mode="reflect")
    places = ((s, 0), (s, 2 * s), (0, s), (2 * s, s))
    return torch.stack([padded[..., top : top + height, left : left + width] for top, left in places])


def clipped(samples: Tensor, given: Tensor, *, distances: Tensor) -> Tensor:
    """Samples [B, 3, H, W], moved to where no value is further than ``distances`` [B] from the given images' values.

    A perturbation is small in every pixel, so what a reconstruction lost beyond that belongs to the picture. ``given``
    are [B, 3, H, W] in [0, 1], distances at least 0.
    """
    most = distances.to(samples)[:, None, None, None]
    return samples.clamp(given - most, given + most)


def class_scores(logits: Tensor, given_logits: Tensor, shifted_logits: Tensor, *, beta: float) -> Tensor:
    r"""Scores of the C classes, [..., C]: log-probabilities on mirrored copies, moved away from the given image.

    Eq. 6 of Ding et al. 2021 moves images away from it; this moves the victim's log-probabilities. With p_s the
    probabilities on S mirrored copies, p_0 those on the given image, and p_v those on its :func:`shifted` copies,

    .. math:: \log \frac{1}{S} \sum_s p_s + \beta \min_v \log \frac{p_v}{p_0}

    To be misclassified, an attacked image must show less of its true class than where it is moved, since a perturbation
    is made for the pixels where it lies. Noise hides classes too, but moving does not bring them back. The scores are
    differentiable.

    Args:
        logits: Of the readings, [S, ..., C]; ValueError for S = 0.
        given_logits: Of the given image, [..., C].
        shifted_logits: Of its shifted copies, [V, ..., C].
        beta: At least 0, else TypeError or ValueError. 0 leaves the second term out.
    """
    check_float(beta, name="beta", low=0.0)
    if len(logits) == 0:
        raise ValueError("`logits` must hold at least one reading, got none")
    wide, parts = widest(logits.device), (logits, given_logits, shifted_logits)
    read, given, elsewhere = (part.to(wide).log_softmax(dim=-1) for part in parts)
    return read.logsumexp(dim=0) - math.log(len(read)) + beta * (elsewhere.amin(dim=0) - given)


def stitch_mirrored(traces: Sequence[DecisionTrace], *, beta: float, decider: Decider) -> list[Reconstruction]:
    """Rebuild B images from their traces, each as the class with the highest score.

    The victim reads four :func:`shifted` copies of each given image, and :func:`class_scores` choose a class. The image
    is the mean of the samples that the victim reads as this class (reason ``class_scores``), which is Eq. 7 over
    another choice of images, or of all samples if there is none. If the victim reads that mean as another class,
    :func:`moved` changes it (``moved``), mostly by at most 2 levels of 255. If even so it is read as another class, the
    reason is ``not_reached``.

    Args:
        traces: Of images of one size, with ``samples`` and ``mirrored_logits``, S of them, else ValueError.
        beta: That of :func:`class_scores`.
        decider: The victim.
    """
    copies = shifted(torch.stack([trace.given for trace in traces]))
    readings = decider(copies.flatten(0, 1)).unflatten(0, copies.shape[:2]).cpu()
    chosen = [_chosen(trace, readings[:, i], beta=beta) for i, trace in enumerate(traces)]
    targets = torch.tensor([target for target, _, _ in chosen], device="cpu")
    means = torch.stack([mean for _, mean, _ in chosen])
    images = moved(means, targets, decider=decider)
    reached = (decider(images).argmax(dim=1).cpu() == targets).tolist()
    made = []
    for image, there, (_, mean, used) in zip(images, reached, chosen, strict=True):
        reason = "not_reached" if not there else "class_scores" if torch.equal(image, mean) else "moved"
        made.append(Reconstruction(image, reason, used))
    return made


def moved(images: Tensor, targets: Tensor, *, decider: Decider) -> Tensor:
    """Move each image [n, 3, H, W] in [0, 1] until the victim is sure of its target class, ``targets`` int64 [n].

    Steps of half a level of 255 in every value, along the sign of the gradient of that class's log-probability, until
    its probability is above 0.9; at most 16 of them. An image that the victim reads as its class stays as it is. So do
    all others, with a warning, if the victim is not differentiable. On a GPU images are moved in batches, smaller ones
    where memory runs out, whose size may change the sign of a gradient near 0, and so a value by a step.
    """
    made = images.clone()
    rows = torch.nonzero(decider(images).argmax(dim=1).to(targets) != targets).flatten()
    # One by one on a CPU, as the native engine's fits do not depend on their stack either; on a GPU all fits do. An
    # eighth of what is read at once, since activations are kept for the gradient.
    alone = device_of(decider.victim).type == "cpu"
    together = 1 if alone else max(1, decider.batch(*images.shape[-2:]) // 8)
    parts, differentiable = [*rows.split(together)] if len(rows) else [], False
    while parts:
        part = parts.pop(0)
        try:
            made[part] = _moved(images[part], targets[part], decider=decider)
            differentiable = True
        except (RuntimeError, TypeError) as error:
            if is_out_of_memory(error) and len(part) > 1:
                parts[:0] = part.tensor_split(2)
                continue
            if is_out_of_memory(error) or differentiable:
                raise
            problem = "the victim has no gradient, so images that it reads as another class are left as they are"
            warnings.warn(f"{problem}: {error}", stacklevel=3)
            break
    return made


def _moved(images: Tensor, targets: Tensor, *, decider: Decider) -> Tensor:
    """Images [n, 3, H, W], moved in one batch."""
    for _ in range(MOST_STEPS):
        likelihoods, gradients = decider.gradient(images, targets)
        unsure = likelihoods <= math.log(SURE)  # an image that stays as it is stays sure
        if not unsure.any():
            break
        steps = STEP * gradients.nan_to_num(nan=0.0).sign()
        images = (images + steps * unsure[:, None, None, None]).clamp(0, 1)
    return images


def _chosen(trace: DecisionTrace, shifted_logits: Tensor, *, beta: float) -> tuple[int, Tensor, Tensor]:
    """The class with the highest score, the mean of the samples read as it, or of all if none is, and their places."""
    if trace.samples is None or trace.mirrored_logits is None:
        raise ValueError("each trace must hold its `samples` and `mirrored_logits`, got one without")
    target = int(class_scores(trace.mirrored_logits, trace.given_scores, shifted_logits, beta=beta).argmax())
    read = trace.scores.argmax(dim=1) == target
    used = torch.nonzero(read).flatten() if read.any() else torch.arange(len(trace.samples), device="cpu")
    return target, trace.samples[used].mean(dim=0).clamp(0, 1), used
