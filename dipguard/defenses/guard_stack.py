"""One stack of the proposed defence: fitted now, or looked up in a store of fits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor

from dipguard.decision import sampled_steps
from dipguard.defenses.result import DefenseResult
from dipguard.fit import DecideOptions, FitProgress, StackResult, choose_stack_size, fit_stack, in_stacks
from dipguard.fit.stacks import Work
from dipguard.store import RuleAsked, StackKeys, StoredResult, holds_traces, stored_stack

if TYPE_CHECKING:
    from dipguard.defenses.dipguard import DIPGuard

REPLAYED = 64
"""Images of a stack that needs no fit."""
REFILLED = 8
"""Stacks' worth of images that one refilled stack fits: results come so many at a time, and its tail costs less."""


def fit_or_find(
    guard: DIPGuard,
    images: Tensor,
    indices: Sequence[int],
    *,
    logger: Logger | None = None,
    first_step: int = 0,
    callbacks: Sequence[pl.Callback] = (),
    rules: Mapping[str, RuleAsked] | None = None,
    keys: StackKeys | None = None,
    slots: int | None = None,
) -> StackResult:
    """:func:`dipguard.fit.fit_stack` with a guard's options or, where it has a store, what the store holds of it.

    Args:
        guard: Whose options.
        images: x0, [B, 3, H, W] in [0, 1].
        indices: Their indices.
        logger: A Lightning logger for the means over the stack.
        first_step: Added to the logger's step numbers.
        callbacks: More callbacks for a fit.
        rules: Stopping rules whose choice is asked of the store too; the result is then a
            :class:`~dipguard.store.StoredResult`.
        keys: The images' :func:`store_keys`, where somebody has made them already.
        slots: Images fitted at once, of a guard with a patience; None: all.

    Raises:
        TypeError, ValueError: Bad images, options or victim.
    """
    logging: dict[str, Any] = {"logger": logger, "first_step": first_step, "callbacks": callbacks}
    made = _fit_or_find(guard, images, indices, rules=rules, keys=keys, slots=slots, **logging)
    if guard.watch is not None:
        guard.watch(made.traces)
    return made


def defend_stack(
    guard: DIPGuard,
    images: Tensor,
    indices: list[int],
    *,
    logger: Logger | None,
    first_step: int,
    progress: FitProgress,
    keys: StackKeys | None,
) -> DefenseResult:
    """Defend one stack; the arguments are those of :func:`fit_or_find`, and the bar's callback."""
    logging: dict[str, Any] = {"logger": logger, "first_step": first_step, "callbacks": [progress]}
    done = fit_or_find(guard, images, indices, keys=keys, slots=progress.slots, **logging)
    if isinstance(done, StoredResult):
        progress.finish(longest(guard))
    start = time.perf_counter()
    reconstructions = torch.stack([r.image for r in done.reconstructions]).to(images)
    after = guard.decide(reconstructions).argmax(dim=1)
    done.seconds["decide"] += time.perf_counter() - start
    return DefenseResult(
        reconstructions=reconstructions,
        decisions_before=torch.tensor([t.given_decision for t in done.traces]),
        decisions_after=after.cpu(),
        traces=done.traces,
        reasons=[r.reason for r in done.reconstructions],
        crossings=[len(r.used) for r in done.reconstructions],
        seconds=done.seconds,
    )


def each_stack(
    guard: DIPGuard, count: int, *, size: int, work: Work[DefenseResult], device: torch.device
) -> Iterator[DefenseResult]:
    """The results of ``work`` on a guard's images, ``size`` at once (:func:`dipguard.fit.in_stacks`)."""
    rounds = 1 if guard.decide_options.patience is None else REFILLED
    T, progress = longest(guard), guard.progress
    return in_stacks(count, size=size, T=T, work=work, device=device, progress=progress, rounds=rounds)


def store_keys(guard: DIPGuard, images: Tensor, indices: Sequence[int], *, logits: Tensor) -> StackKeys | None:
    """The images' keys, if the guard has a store; ``logits`` [1, C] are what its victim says of the first one."""
    if guard.store is None:
        return None
    T, device = guard.decide_options.T, guard.device_of(images)
    keys = StackKeys(images, indices=indices, fit=guard.fit_options, T=T, device=device, logits=logits)
    keys.traces(guard.victim, guard.decide_options)
    return keys


def check_storable(decide: DecideOptions) -> None:
    """Raise ValueError for options that fits and readings from a store cannot have."""
    if decide.patience is not None:
        raise ValueError(
            f"`patience` must be None with a `store`, got {decide.patience}: it makes fits depend on tau and K"
        )
    if decide.victim_speed != "as_is":
        raise ValueError(f"`victim_speed` must be 'as_is' with a `store`, got {decide.victim_speed!r}")


def stack_size(guard: DIPGuard, images: Tensor, *, keys: StackKeys | None = None) -> int:
    """How many of ``images`` are fitted at once; with their keys, whether they must be fitted is looked up first."""
    if guard.stack_size is not None:
        return guard.stack_size
    decide, store = guard.decide_options, guard.store
    if store is not None and keys is not None and holds_traces(store, keys.traces(guard.victim, decide)):
        return REPLAYED
    size, device = (images.shape[-2], images.shape[-1]), guard.device_of(images)
    return choose_stack_size(len(images), size=size, fit=guard.fit_options, decide=_kept(guard), device=device)


def longest(guard: DIPGuard) -> int:
    """Steps of a fit that is made now."""
    return max(options.T for options in (guard.decide_options, *guard.also))


def _kept(guard: DIPGuard) -> DecideOptions:
    """What a fit keeps in memory: for a store, the samples of everything that it shall serve."""
    if guard.store is None:
        return guard.decide_options
    asked = (guard.decide_options, *guard.also)
    steps = {step for o in asked for step in sampled_steps(o.T, decisions=o.decisions, every=o.every)}
    return replace(guard.decide_options, T=longest(guard), decisions=len(steps), every=None, keep_samples=True)


def _fit_or_find(
    guard: DIPGuard,
    images: Tensor,
    indices: Sequence[int],
    *,
    logger: Logger | None,
    first_step: int,
    callbacks: Sequence[pl.Callback],
    rules: Mapping[str, RuleAsked] | None,
    keys: StackKeys | None,
    slots: int | None,
) -> StackResult:
    device = guard.device_of(images)
    if guard.store is None:
        return fit_stack(
            images,
            victim=guard.victim,
            indices=indices,
            fit=guard.fit_options,
            decide=guard.decide_options,
            stitch=guard.stitch_options,
            device=device,
            logger=logger,
            first_step=first_step,
            callbacks=callbacks,
            slots=slots,
        )
    return stored_stack(
        images,
        store=guard.store,
        victim=guard.victim,
        indices=indices,
        fit=guard.fit_options,
        decide=guard.decide_options,
        stitch=guard.stitch_options,
        device=device,
        also=guard.also,
        rules=rules,
        keys=keys,
        logger=logger,
        first_step=first_step,
        callbacks=callbacks,
    )
