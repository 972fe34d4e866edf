"""Cross-boundary pairs and on-boundary images: Eq. 3-5 of Ding et al. 2021."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dipguard.checks import check_choice, check_float, check_int

RULES = ("at_least", "above")
"""How v(t) and t are held to their thresholds: ``>=`` (Algorithm 1) or ``>`` (Eq. 3)."""
T0_UNITS = ("steps", "samples")
"""What t0 counts: optimiser steps (section 3.2, "iteration number") or sampled reconstructions."""
SCORES = ("logits", "probabilities")
"""Which scores f_c Eq. 5 compares."""


def crosses(before: Tensor, after: Tensor) -> Tensor:
    r"""The first condition of Eq. 3: y(t) != y(t+1).

    .. math:: I = \lbrace t \mid y^{(t)} \neq y^{(t+1)} \wedge v^{(t)} > \tau \wedge t > t_0 \rbrace

    Args:
        before: Decisions y(t), integers of any shape.
        after: Decisions of the next samples, the same shape.

    Returns:
        Booleans of that shape.
    """
    return before != after


def passes(
    quality: Tensor,
    steps: Tensor,
    *,
    tau: float,
    t0: int,
    rule: str = "at_least",
    t0_unit: str = "steps",
    position: Tensor | None = None,
) -> Tensor:
    """The other two conditions of Eq. 3: v(t) over tau, and t past the warm-up.

    Args:
        quality: v(t) of the pairs' first images, [M].
        steps: Their optimiser steps t, [M].
        tau: Threshold of the quality, in [0, 1].
        t0: Warm-up, at least 0, in the unit ``t0_unit``.
        rule: ``at_least`` (>=, Algorithm 1 lines 9 and 11) or ``above`` (>, Eq. 3), for both thresholds.
        t0_unit: ``steps`` or ``samples``.
        position: Number of the pairs' first samples, [M]; needed for ``samples`` alone.

    Returns:
        Booleans [M].

    Raises:
        ValueError: A threshold is out of range, or a choice is unknown.
    """
    check_float(tau, name="tau", low=0.0, high=1.0)
    check_int(t0, name="t0", low=0)
    check_choice(rule, RULES, name="rule")
    check_choice(t0_unit, T0_UNITS, name="t0_unit")
    if t0_unit == "samples":
        if position is None:
            raise ValueError("`position` must be given when `t0_unit` is 'samples', got None")
        steps = position
    # Both sides as stored: a threshold rounded to float32 would decide ties otherwise than the number that was asked
    # for.
    if rule == "at_least":
        return (quality.double() >= tau) & (steps >= t0)
    return (quality.double() > tau) & (steps > t0)


def localise(
    before: Tensor,
    after: Tensor,
    scores_before: Tensor,
    scores_after: Tensor,
    classify: Callable[[Tensor], Tensor],
    *,
    N: int = 10,
    scores: str = "logits",
) -> tuple[Tensor, Tensor]:
    r"""On-boundary images of M cross-boundary pairs: Eq. 4, with alpha by the grid search of Eq. 5.

    .. math:: x_{db}^{(t)} = \alpha x^{(t)} + (1 - \alpha) x^{(t+1)}, \quad
        \alpha = \arg\min_\alpha |f_{y^{(t)}}(x_{db}^{(t)}) - f_{y^{(t+1)}}(x_{db}^{(t)})|

    x_db = alpha x(t) + (1 - alpha) x(t+1), where alpha in {0, 1/N, ..., 1} makes |f_y(t)(x_db) - f_y(t+1)(x_db)|
    smallest; of equal ones the smallest alpha is taken. The ends of the grid were classified when they were sampled
    and are not classified again.

    Args:
        before: x(t), [M, 3, H, W].
        after: x(t+1), the same shape.
        scores_before: The victim's logits on x(t), [M, C].
        scores_after: The victim's logits on x(t+1), [M, C].
        classify: The victim: images [n, 3, H, W] to logits [n, C].
        N: Sections of the grid, at least 1; alpha is off by at most 1/(2N).
        scores: ``logits`` or ``probabilities``, the f_c of Eq. 5.

    Returns:
        alpha [M] and the on-boundary images [M, 3, H, W].

    Raises:
        ValueError: N or ``scores`` is out of range.
    """
    check_int(N, name="N", low=1)
    check_choice(scores, SCORES, name="scores")
    M = len(before)
    alphas = torch.arange(N + 1, device=before.device, dtype=before.dtype) / N
    inner = alphas[1:-1].view(1, -1, 1, 1, 1)
    mixed = inner * before.unsqueeze(1) + (1 - inner) * after.unsqueeze(1)
    logits = scores_before.new_empty(M, N + 1, scores_before.shape[1])
    logits[:, 0], logits[:, N] = scores_after, scores_before
    if N > 1 and M > 0:
        logits[:, 1:-1] = classify(mixed.flatten(0, 1)).view(M, N - 1, -1).to(logits.dtype)
    f = logits.softmax(-1) if scores == "probabilities" else logits
    y = torch.stack([scores_before.argmax(-1), scores_after.argmax(-1)], dim=-1)
    pair = f.gather(-1, y.unsqueeze(1).expand(M, N + 1, 2))
    best = (pair[..., 0] - pair[..., 1]).abs().argmin(dim=1)
    alpha = alphas[best]
    weight = alpha.view(-1, 1, 1, 1)
    return alpha, weight * before + (1 - weight) * after


def needed_for_replay(quality: Tensor, *, K_max: int) -> Tensor:
    """Which crossings of one image any (tau, t0, K <= K_max) can still ask for.

    I_K is the last K crossings among those with v >= tau. A crossing is among them for some tau only if fewer than
    K_max later ones have a quality at least as high; all others can be forgotten, now and for good, since later
    crossings only push it further back.

    Args:
        quality: v(t) of the crossings in the order of time, [M].
        K_max: The largest K that a replay may ask for, at least 1.

    Returns:
        Booleans [M].
    """
    check_int(K_max, name="K_max", low=1)
    M = len(quality)
    later = torch.ones(M, M, dtype=torch.bool, device=quality.device).triu(diagonal=1)
    dominating = (quality.unsqueeze(0) >= quality.unsqueeze(1)) & later
    return dominating.sum(dim=1) < K_max
