"""The fit of a deep image prior that is stopped: its options, its stack size, and one stack of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from dipguard.decision.stopping import Stopped
from dipguard.fit import DecideOptions, FitOptions, FitProgress, choose_stack_size, fit_device
from dipguard.fit.stop_rules import fit_rules
from dipguard.store import RuleAsked, TraceStore, stored_rule

DENOISING: dict[str, Any] = {"jitter": 1 / 30, "padding": "reflect"}
"""How the official DIP code fits for denoising: slowly and smoothly, so that a rule can find the turning point.
DIPGuard's own fit, without noise on z, is past it after some 100 steps (docs/readings.md)."""


def stop_stack(
    images: Tensor,
    asked: RuleAsked,
    *,
    store: TraceStore | None,
    indices: Sequence[int],
    fit: FitOptions,
    device: torch.device,
    progress: FitProgress,
) -> Stopped:
    """What one rule chooses of the fits of B images; with a store, only those are fitted that it does not know.

    Args:
        images: x0, [B, 3, H, W] in [0, 1].
        asked: The rule.
        store: Where choices are kept, if anywhere.
        indices: The images' indices.
        fit: How to fit.
        device: Where to fit.
        progress: The bar's callback.

    Raises:
        TypeError, ValueError: Bad images or options.
    """
    if store is None:
        rules = {"rule": asked.make()}
        made = fit_rules(images, rules=rules, indices=indices, fit=fit, T=asked.T, device=device, callbacks=[progress])
        return made["rule"]
    found = stored_rule(images, asked, store=store, indices=indices, fit=fit, device=device, callbacks=[progress])
    progress.finish(asked.make().steps_needed(asked.T))
    return found


def fit_options(fit: Mapping[str, Any] | FitOptions | None, *, seed: int) -> FitOptions:
    """A defence's fit: what is given, on FitOptions' defaults, with the defence's seed.

    Raises:
        TypeError, ValueError: An unknown field, a value out of range, or another seed.
    """
    if isinstance(fit, FitOptions):
        if fit.seed not in (FitOptions.seed, seed):
            raise ValueError(f"`fit` must leave the seed to `seed`, got {fit.seed} beside {seed}")
        return replace(fit, seed=seed)
    given = dict(fit or {})
    known = [field.name for field in fields(FitOptions) if field.name != "seed"]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TypeError(f"`fit` takes no {', '.join(map(repr, unknown))}; its fields are: {', '.join(known)}")
    return FitOptions(**given, seed=seed)


def stack_size_of(images: Tensor, *, victim: nn.Module, fits: Sequence[FitOptions], T: int, kept: int) -> int:
    """How many of ``images`` are fitted at once (:func:`dipguard.fit.stack_size.choose_stack_size`).

    Args:
        images: x0, [N, 3, H, W].
        victim: Where it is, the fits run.
        fits: Of one image, made one after the other; what suits all of them is chosen.
        T: Steps of each.
        kept: Images that are kept of each image's fits.
    """
    # For each image of K_max, memory for three is set aside.
    decide = DecideOptions(T=max(2, T), decisions=2, K_max=max(1, -(-kept // 3)))
    device = fit_device("auto", victim=victim, images=images)
    size = (images.shape[-2], images.shape[-1])
    return min(choose_stack_size(len(images), size=size, fit=fit, decide=decide, device=device) for fit in fits)
