"""On-manifold images and their stitch: Eq. 6-7 of Ding et al. 2021, and their replay on a decision trace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dipguard.checks import check_choice, check_float, check_int
from dipguard.decision.boundary import T0_UNITS, passes
from dipguard.decision.trace import DecisionTrace

DIVISORS = ("found", "K")
"""What Eq. 7 divides the sum by when fewer than K crossings exist: their number, or K all the same."""


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A rebuilt image, and what it was made from.

    Attributes:
        image: The stitched image of Eq. 7, [3, H, W], clamped to [0, 1].
        reason: ``crossings`` (Eq. 6-7) or ``no_crossing`` (mean of the last K sampled reconstructions, beta = 0);
            ``class_scores``, ``moved`` or ``not_reached`` (:func:`~dipguard.decision.class_scores.stitch_mirrored`).
        used: Positions of the stitched images in ``trace.on_boundary`` or ``trace.samples``, [k] int64; empty for
            ``no_crossing``.
    """

    image: Tensor
    reason: str
    used: Tensor


def on_manifold(on_boundary: Tensor, given: Tensor, *, beta: float) -> Tensor:
    r"""Eq. 6: x_db + beta (x_db - x0), a step of size beta away from the given image.

    .. math:: x_{manifold}^{(t)} = x_{db}^{(t)} + \beta (x_{db}^{(t)} - x_0), \quad t \in I_K

    ``on_boundary`` is x_db, [k, 3, H, W], ``given`` x0, [3, H, W], ``beta`` at least 0, else ValueError. Returns
    [k, 3, H, W]; values may leave [0, 1], and are not clamped, since Eq. 6 has no clamp.
    """
    check_float(beta, name="beta", low=0.0)
    return on_boundary + beta * (on_boundary - given)


def stitch_images(images: Tensor, *, K: int, divide_by: str = "found") -> Tensor:
    r"""Eq. 7: the mean of the on-manifold images, clamped to [0, 1] so that a victim can classify it.

    .. math:: \hat{x}_{rec} = \frac{1}{K} \sum_{t \in I_K} x_{manifold}^{(t)}

    Args:
        images: [k, 3, H, W] with 1 <= k <= K, else ValueError.
        K: Number of images that Eq. 7 divides by.
        divide_by: ``found`` divides by k, ``K`` by K even when k < K (which darkens the image).
    """
    check_int(K, name="K", low=1)
    check_choice(divide_by, DIVISORS, name="divide_by")
    if not 1 <= len(images) <= K:
        raise ValueError(f"`images` must hold from 1 to K={K} images, got {len(images)}")
    return (images.sum(dim=0) / (len(images) if divide_by == "found" else K)).clamp(0, 1)


def select(
    trace: DecisionTrace, *, tau: float, t0: int, K: int, rule: str = "at_least", t0_unit: str = "steps"
) -> Tensor:
    """I_K: positions in ``trace.on_boundary`` of the last K crossings that pass tau and t0 (Eq. 3, section 3.2).

    K is from 1 to ``trace.K_max``. tau, t0 and ``rule`` are those of :func:`dipguard.decision.boundary.passes`,
    ``t0_unit`` is what t0 counts, ``steps`` or ``samples``; TypeError or ValueError if one is out of range. Returns
    [k] int64 in the order of time, k <= K.
    """
    check_int(K, name="K", low=1, high=trace.K_max)
    check_choice(t0_unit, T0_UNITS, name="t0_unit")
    at = trace.crossing_at
    t = trace.steps[at] if t0_unit == "steps" else at
    return torch.nonzero(passes(trace.quality[at], t, tau=tau, t0=t0, rule=rule)).flatten()[-K:]


def stitch(
    trace: DecisionTrace, *, tau: float, t0: int, K: int, beta: float, divide_by: str = "found", **which: str
) -> Reconstruction:
    """Rebuild one image from its decision trace (Algorithm 1, lines 9-18), without fitting again.

    :func:`select` takes tau, t0, K and ``which`` (``rule``, ``t0_unit``), :func:`on_manifold` beta,
    :func:`stitch_images` ``divide_by``; TypeError or ValueError if one is out of range. Without crossings the image is
    the mean of the last K samples. ValueError for a trace of MirrorGuard, whose ``rebuild`` stitches it.
    """
    if trace.mirrored_logits is not None:
        raise ValueError("`trace` must be of a fit of DIPGuard, got one of MirrorGuard, whose `rebuild` stitches it")
    check_float(beta, name="beta", low=0.0)
    used = select(trace, tau=tau, t0=t0, K=K, **which)
    if len(used) == 0:
        last = trace.last[-K:]
        return Reconstruction(stitch_images(last, K=len(last), divide_by=divide_by), "no_crossing", used)
    moved = on_manifold(trace.on_boundary[used], trace.given, beta=beta)
    return Reconstruction(stitch_images(moved, K=K, divide_by=divide_by), "crossings", used)
