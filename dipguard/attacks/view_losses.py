"""What an attack makes rise: losses of several views of each image at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the true class's: above 0 where misread.

    Args:
        logits: [..., C].
        labels: int [...].

    Returns:
        [...].
    """
    true = labels.unsqueeze(-1)
    others = logits.scatter(-1, true, -torch.inf)
    return others.amax(dim=-1) - logits.gather(-1, true).squeeze(-1)


def mean_probability_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative logarithm of the true class's probability, mean over the views; log V, a constant, is left out.

    Args:
        logits: [V, B, C].
        labels: int [B].

    Returns:
        [B].
    """
    each = logits.log_softmax(dim=-1)
    return -each.gather(-1, labels.expand(len(logits), -1).unsqueeze(-1)).squeeze(-1).logsumexp(dim=0)


def mean_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """`margins`, mean over the views: [V, B, C] and int [B] -> [B]."""
    return margins(logits, labels.expand(len(logits), -1)).mean(dim=0)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": mean_probability_ce, "margin": mean_margin}
"""Name -> loss of logits [V, B, C] and labels int [B]."""
