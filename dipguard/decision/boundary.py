"""Cross-boundary pairs and on-boundary images: Eq. 3-5 of Ding et al. 2021."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dipguard.checks import check_choice, check_float, check_int

RULES = ("at_least", "above")
"""How v(t) and t are compared with their thresholds: ``>=`` (Algorithm 1) or ``>`` (Eq. 3)."""
T0_UNITS = ("steps", "samples")
"""What t0 counts: optimiser steps (section 3.2, "iteration number") or sampled reconstructions."""
SCORES = ("logits", "probabilities")
"""The scores f_c that Eq. 5 compares."""


def crosses(before: Tensor, after: Tensor) -> Tensor:
    r"""The first condition of Eq. 3: y(t) != y(t+1).

    .. math:: I = \lbrace t \mid y^{(t)} \neq y^{(t+1)} \wedge v^{(t)} > \tau \wedge t > t_0 \rbrace

    ``before`` and ``after`` are the decisions of neighbouring samples, of one shape; returns booleans of this shape.
    """
    return before != after


def check_thresholds(*, tau: float, t0: int, rule: str) -> None:
    """Raise TypeError or ValueError unless the thresholds of Eq. 3 are in range and the rule is known."""
    check_float(tau, name="tau", low=0.0, high=1.0)
    check_int(t0, name="t0", low=0)
    check_choice(rule, RULES, name="rule")


def passes(quality: Tensor, t: Tensor, *, tau: float, t0: int, rule: str = "at_least") -> Tensor:
    """The other two conditions of Eq. 3: v(t) over tau, and t past the warm-up; booleans [M].

    TypeError or ValueError if a threshold is out of range, or the rule is unknown.

    Args:
        quality: v(t) of the pairs' first images, [M].
        t: Their optimiser steps or sample numbers, [M].
        tau: Threshold of the quality, in [0, 1].
        t0: Warm-up, at least 0, in the unit of ``t``.
        rule: ``at_least`` (>=, Algorithm 1 lines 9 and 11) or ``above`` (>, Eq. 3), for both thresholds.
    """
    check_thresholds(tau=tau, t0=t0, rule=rule)
    # In float64: a threshold rounded to float32 could decide ties differently.
    if rule == "at_least":
        return (quality.double() >= tau) & (t >= t0)
    return (quality.double() > tau) & (t > t0)


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

    alpha is in {0, 1/N, ..., 1}; of equal differences the smallest alpha is taken. The ends are not classified again.
    Returns alpha [M] and the on-boundary images [M, 3, H, W]. TypeError or ValueError for a bad N or ``scores``.

    Args:
        before, after: x(t) and x(t+1), [M, 3, H, W] each.
        scores_before, scores_after: The victim's logits on them, [M, C] each.
        classify: The victim: images [n, 3, H, W] to logits [n, C].
        N: Sections of the grid, at least 1; where the scores change linearly, alpha is off by at most 1/(2N).
        scores: f_c of Eq. 5, ``logits`` or ``probabilities``.
    """
    check_int(N, name="N", low=1)
    check_choice(scores, SCORES, name="scores")
    y = torch.stack([scores_before.argmax(-1), scores_after.argmax(-1)], dim=-1)
    alphas = torch.arange(N + 1, device=before.device, dtype=before.dtype) / N
    f = torch.stack([scores_after, scores_before], dim=1)  # at alpha 0 and 1; [M, N + 1, C] in the end
    if N > 1 and len(before) > 0:
        weight = alphas[1:-1].view(1, -1, 1, 1, 1)
        mixed = weight * before.unsqueeze(1) + (1 - weight) * after.unsqueeze(1)
        inner = classify(mixed.flatten(0, 1)).to(scores_before.dtype).view(len(before), N - 1, -1)
        f = torch.cat([f[:, :1], inner, f[:, 1:]], dim=1)
    if scores == "probabilities":
        f = f.softmax(-1)
    pair = f.gather(-1, y.unsqueeze(1).expand(-1, f.shape[1], -1))
    alpha = alphas[(pair[..., 0] - pair[..., 1]).abs().argmin(dim=1)]
    weight = alpha.view(-1, 1, 1, 1)
    return alpha, weight * before + (1 - weight) * after


def needed_for_replay(quality: Tensor, *, K_max: int) -> Tensor:
    """Which crossings of one image some (tau, t0, K <= K_max) can still select.

    I_K is the last K crossings among those with v >= tau. A crossing is among them for some tau only if fewer than
    K_max later ones have a quality at least as high. All others can be dropped for good. ``quality`` is v(t) of the
    crossings in the order of time, [M]; returns booleans [M].
    """
    check_int(K_max, name="K_max", low=1)
    later = torch.ones(len(quality), len(quality), dtype=torch.bool, device=quality.device).triu(diagonal=1)
    dominating = (quality.unsqueeze(0) >= quality.unsqueeze(1)) & later
    return dominating.sum(dim=1) < K_max
