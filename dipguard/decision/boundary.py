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
SEARCHES = ("grid", "bisection")
"""Where alpha is searched: at every point of the grid, or by bisection for a change of sign."""


def crosses(before: Tensor, after: Tensor) -> Tensor:
    r"""The first condition of Eq. 3: y(t) != y(t+1).

    .. math:: I = \lbrace t \mid y^{(t)} \neq y^{(t+1)} \wedge v^{(t)} > \tau \wedge t > t_0 \rbrace

    ``before`` and ``after`` are the decisions of neighbouring samples, of any shape.
    """
    return before != after


def check_thresholds(*, tau: float, t0: int, rule: str, t0_unit: str) -> None:
    """Raise TypeError or ValueError unless the thresholds of Eq. 3 are in range and the choices are known."""
    check_float(tau, name="tau", low=0.0, high=1.0)
    check_int(t0, name="t0", low=0)
    check_choice(rule, RULES, name="rule")
    check_choice(t0_unit, T0_UNITS, name="t0_unit")


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
        position: Number of the pairs' first samples, [M]; needed for ``samples`` only.

    Returns:
        Booleans [M].

    Raises:
        ValueError: A threshold is out of range, or a choice is unknown.
    """
    check_thresholds(tau=tau, t0=t0, rule=rule, t0_unit=t0_unit)
    if t0_unit == "samples":
        if position is None:
            raise ValueError("`position` must be given when `t0_unit` is 'samples', got None")
        steps = position
    # In float64: a threshold rounded to float32 could decide ties differently.
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
    search: str = "grid",
) -> tuple[Tensor, Tensor]:
    r"""On-boundary images of M cross-boundary pairs: Eq. 4, with alpha by the grid search of Eq. 5.

    .. math:: x_{db}^{(t)} = \alpha x^{(t)} + (1 - \alpha) x^{(t+1)}, \quad
        \alpha = \arg\min_\alpha |f_{y^{(t)}}(x_{db}^{(t)}) - f_{y^{(t+1)}}(x_{db}^{(t)})|

    alpha is in {0, 1/N, ..., 1}; of equal differences the smallest alpha is taken. The ends are not classified again.

    Args:
        before: x(t), [M, 3, H, W].
        after: x(t+1), the same shape.
        scores_before: The victim's logits on x(t), [M, C].
        scores_after: The victim's logits on x(t+1), [M, C].
        classify: The victim: images [n, 3, H, W] to logits [n, C].
        N: Sections of the grid, at least 1; alpha is off by at most 1/(2N).
        scores: f_c of Eq. 5, ``logits`` or ``probabilities``.
        search: ``grid`` classifies all N - 1 inner points. ``bisection`` classifies at most ceil(log2(N)) of them and
            gives the better side of one change of sign: the same alpha if f_y(t) - f_y(t+1) is monotone.

    Returns:
        alpha [M] and the on-boundary images [M, 3, H, W].

    Raises:
        ValueError: N, ``scores`` or ``search`` is out of range.
    """
    check_int(N, name="N", low=1)
    check_choice(scores, SCORES, name="scores")
    check_choice(search, SEARCHES, name="search")
    y = torch.stack([scores_before.argmax(-1), scores_after.argmax(-1)], dim=-1)

    def difference(logits: Tensor, classes: Tensor) -> Tensor:
        """f_y(t) - f_y(t+1) of logits [m, n, C]."""
        f = logits.softmax(-1) if scores == "probabilities" else logits
        pair = f.gather(-1, classes.unsqueeze(1).expand(*logits.shape[:2], 2))
        return pair[..., 0] - pair[..., 1]

    alphas = torch.arange(N + 1, device=before.device, dtype=before.dtype) / N

    def ask(points: Tensor, rows: Tensor) -> Tensor:
        """The differences at n points of the grid for each of m pairs, [m, n] -> [m, n]."""
        weight = alphas[points].view(*points.shape, 1, 1, 1)
        mixed = weight * before[rows].unsqueeze(1) + (1 - weight) * after[rows].unsqueeze(1)
        logits = classify(mixed.flatten(0, 1)).to(scores_before.dtype)
        return difference(logits.view(*points.shape, -1), y[rows])

    ends = difference(torch.stack([scores_after, scores_before], dim=1), y)
    best = (_grid if search == "grid" else _bisect)(ends, ask, N=N)
    alpha = alphas[best]
    weight = alpha.view(-1, 1, 1, 1)
    return alpha, weight * before + (1 - weight) * after


def _grid(ends: Tensor, ask: Callable[[Tensor, Tensor], Tensor], *, N: int) -> Tensor:
    """The points of the smallest absolute difference; ``ends`` [M, 2] are those at 0 and N."""
    found = ends
    if N > 1 and len(ends) > 0:
        points, rows = torch.arange(1, N, device=ends.device), torch.arange(len(ends), device=ends.device)
        found = torch.cat([ends[:, :1], ask(points.expand(len(ends), -1), rows), ends[:, 1:]], dim=1)
    return found.abs().argmin(dim=1)


def _bisect(ends: Tensor, ask: Callable[[Tensor, Tensor], Tensor], *, N: int) -> Tensor:
    """The better of two neighbouring points between which the difference changes its sign, the first if both are equal.

    The difference is never above zero at 0 and never below zero at N, since each end is decided for its own class.
    """
    low, high = (torch.full((len(ends),), end, device=ends.device, dtype=torch.int64) for end in (0, N))
    at_low, at_high = (end.clone() for end in ends.unbind(1))
    while len(rows := torch.nonzero(high - low > 1).flatten()):
        middle = (low[rows] + high[rows]) // 2
        here = ask(middle.unsqueeze(1), rows).squeeze(1)
        below, above = here < 0, here >= 0
        low[rows[below]], at_low[rows[below]] = middle[below], here[below]
        high[rows[above]], at_high[rows[above]] = middle[above], here[above]
    return torch.where(at_low.abs() <= at_high.abs(), low, high)


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
