"""A fit's trace as another victim sees it, without another fit (appendix E)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from dipguard.decision import DecisionTrace, crosses, localise, needed_for_replay
from dipguard.fit.decider import Decider


def redecide(trace: DecisionTrace, victim: nn.Module) -> DecisionTrace:
    """The trace that the same fit would have left had ``victim`` been asked.

    The fit never asks the victim, so its reconstructions, their quality and their loss stay what they were; decisions,
    crossings and on-boundary images are the new victim's.

    Args:
        trace: Made with ``keep_samples``: all sampled reconstructions are read again.
        victim: Takes [n, 3, H, W] in [0, 1], returns logits [n, C]. Never changed.

    Returns:
        A new trace with the same settings, among them N and the scores of Eq. 5.

    Raises:
        TypeError, ValueError: A bad victim, or a trace without its samples.
    """
    if trace.samples is None:
        raise ValueError(
            f"`trace` of image {trace.index} must hold its sampled reconstructions: fit with keep_samples=True"
        )
    decider = Decider(victim)
    samples = trace.samples
    scores, given_scores = decider(samples).cpu(), decider(trace.given[None])[0].cpu()
    decisions = scores.argmax(dim=1)
    at = torch.nonzero(crosses(decisions[:-1], decisions[1:])).flatten()
    at = at[needed_for_replay(trace.quality[at].double(), K_max=trace.K_max)]
    alpha, on_boundary = localise(
        samples[at],
        samples[at + 1],
        scores[at],
        scores[at + 1],
        decider,
        N=int(trace.settings.get("N", 10)),
        scores=str(trace.settings.get("scores", "logits")),
    )
    return replace(
        trace, scores=scores, given_scores=given_scores, crossing_at=at, alpha=alpha, on_boundary=on_boundary
    )
