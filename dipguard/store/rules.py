"""Stopping rules alone, on fits that no victim is asked about; what a rule chose once is not chosen again."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from torch import Tensor

from dipguard.checks import check_images
from dipguard.decision.stopping import Stopped
from dipguard.fit import FitOptions
from dipguard.fit.stop_rules import fit_rules
from dipguard.store.folder import TraceStore
from dipguard.store.stack_keys import StackKeys
from dipguard.store.stopped import Choice, RuleAsked, one_a_key, read_choice, stacked, write_choice


def stored_rule(
    images: Tensor,
    asked: RuleAsked,
    *,
    store: TraceStore,
    indices: Sequence[int],
    fit: FitOptions,
    device: torch.device,
    callbacks: Sequence[pl.Callback] = (),
) -> Stopped:
    """What a stopping rule chooses of the fits of B images; only those are fitted of which nobody knows.

    Args:
        images: x0, [B, 3, H, W] in [0, 1].
        asked: The rule.
        store: Where choices are kept.
        indices: The images' indices.
        fit: How to fit.
        device: Where to fit.
        callbacks: More callbacks for a fit that is made now; it may hold fewer than B images.

    Raises:
        TypeError, ValueError: Bad images or options.
    """
    check_images(images)
    steps = asked.make().steps_needed(asked.T)
    with torch.inference_mode(False), torch.no_grad():
        keys = StackKeys(images, indices=indices, fit=fit, T=steps, device=device)
    found = {b: read_choice(store, key, asked) for b, key in enumerate(keys.fits)}
    while missing := [b for b in found if found[b] is None]:
        with store.claim([keys.fits[b] for b in missing]) as mine:
            rows = [b for b in one_a_key(missing, keys.fits) if keys.fits[b] in mine]
            for b in rows:  # somebody may have made it since
                found[b] = read_choice(store, keys.fits[b], asked)
            rows = [b for b in rows if found[b] is None]
            if rows:
                made = _choose(images, asked, rows, keys, fit=fit, device=device, callbacks=callbacks)
                store.counts["fitted"] += len(rows)
                for b, choice in made.items():
                    write_choice(store, keys.fits[b], asked, choice, keys.about(b))
                found |= made
        for b in missing:
            if found[b] is None:
                found[b] = read_choice(store, keys.fits[b], asked)
    return stacked([choice for choice in found.values() if choice is not None])


def _choose(
    images: Tensor,
    asked: RuleAsked,
    rows: list[int],
    keys: StackKeys,
    *,
    fit: FitOptions,
    device: torch.device,
    callbacks: Sequence[pl.Callback],
) -> dict[int, Choice]:
    start = time.perf_counter()
    (chosen,) = fit_rules(
        images[rows],
        rules={"rule": asked.make()},
        indices=[keys.indices[b] for b in rows],
        fit=fit,
        T=asked.T,
        device=device,
        callbacks=callbacks,
    ).values()
    share = (time.perf_counter() - start) / len(rows)
    choices = [Choice(image.cpu(), int(step), share) for image, step in zip(*chosen, strict=True)]
    return dict(zip(rows, choices, strict=True))
