"""A fit's trace as another victim sees it, without another fit (appendix E)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from dipguard.decision import DecisionTrace, crosses, localise, needed_for_replay, sampled_steps
from dipguard.fit.decider import Decider
from dipguard.fit.module import FitOptions
from dipguard.fit.runner import DecideOptions
from dipguard.fit.samples import FitSamples


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
    decided: dict[str, Any] = _decide(
        trace.given, trace.samples, trace.quality, Decider(victim), trace.K_max, trace.settings
    )
    return replace(trace, **decided)


def decide_samples(
    fitted: FitSamples, *, given: Tensor, index: int, victim: Decider, fit: FitOptions, decide: DecideOptions
) -> DecisionTrace:
    """The trace that a fit with these decisions would have left, from a fit that was sampled at these steps and more.

    The victim sees the samples of one image as a batch, so that what is decided depends on no other image. During a fit
    it sees all images at one step, or at a few, as a batch: its logits may then differ by rounding. All else is equal,
    bit by bit, unless that rounding tips a decision or the choice between two alphas.

    Args:
        fitted: One image's fit, sampled at the steps of ``decide`` at least; a longer fit than its T serves too.
        given: The given image x0, [3, H, W] in [0, 1].
        index: Its index.
        victim: Whom to ask.
        fit: How it was fitted.
        decide: What the victim sees, and what is kept.

    Raises:
        TypeError, ValueError: A bad victim, or steps that were not sampled.
    """
    seen = fitted.at(sampled_steps(decide.T, decisions=decide.decisions, every=decide.every))
    given = given.detach().to(device="cpu", dtype=seen.images.dtype, copy=True)
    settings = trace_settings(fit, decide)
    return DecisionTrace(
        index=index,
        given=given,
        steps=seen.steps,
        quality=seen.quality,
        loss=seen.loss,
        last=seen.images[-decide.K_max :].clone(),
        samples=seen.images if decide.keep_samples else None,
        settings=settings,
        **_decide(given, seen.images, seen.quality, victim, decide.K_max, settings),
    )


def trace_settings(fit: FitOptions, decide: DecideOptions) -> dict[str, Any]:
    """What a trace says of its fit, as a fit without ``patience`` writes it."""
    return {**fit.as_settings(), **asdict(decide)}


def _decide(
    given: Tensor, samples: Tensor, quality: Tensor, decider: Decider, K_max: int, settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """A trace's fields that depend on the victim."""
    scores = decider(samples).cpu()
    # Not alone: a batch of one takes other kernels, which round otherwise than those of a stack.
    given_scores = decider(torch.stack([given, samples[0]]))[0].cpu()
    decisions = scores.argmax(dim=1)
    at = torch.nonzero(crosses(decisions[:-1], decisions[1:])).flatten()
    at = at[needed_for_replay(quality[at].double(), K_max=K_max)]
    alpha, on_boundary = localise(
        samples[at],
        samples[at + 1],
        scores[at],
        scores[at + 1],
        decider,
        N=int(settings.get("N", 10)),
        scores=str(settings.get("scores", "logits")),
        search=str(settings.get("search", "grid")),
    )
    return {
        "scores": scores,
        "given_scores": given_scores,
        "crossing_at": at,
        "alpha": alpha,
        "on_boundary": on_boundary,
    }
