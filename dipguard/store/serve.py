"""A stacked fit that is looked up first: the store's counterpart of :func:`dipguard.fit.fit_stack`.

Of a stack only those images are fitted that the store does not hold, and each of them by one process alone. What an
image gets is what a fit of its own with these settings would have given: x(t) depends neither on T nor on how often the
victim is asked, so that one long fit, sampled at the steps of every shorter one, serves them all, bit by bit (with the
native engine; the others' rounding depends on the number of images in a stack).

200 decisions of T = 750 are no prefix of 200 of T = 1000 (section 4.1 spreads them evenly). A fit for Table 3 is
therefore sampled at the union of all five schedules (``also``): 608 of 1500 steps. With decisions at a fixed distance
(``every``) the shorter schedules are prefixes, and the union is the longest.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor, nn

from dipguard.checks import check_images
from dipguard.decision import DecisionTrace
from dipguard.decision.stopping import Stopped
from dipguard.fit import DecideOptions, FitOptions, StackResult, StitchOptions
from dipguard.store.folder import TraceStore
from dipguard.store.lookup import Found, StackLookup
from dipguard.store.stack_keys import StackKeys
from dipguard.store.stopped import RuleAsked, one_a_key, stacked


@dataclass(frozen=True)
class StoredResult(StackResult):
    """What a stack gave.

    Attributes:
        stopped: What each rule chose, by name.
        spared: Seconds that the fits and decisions took which were not made again.
    """

    stopped: dict[str, Stopped]
    spared: float


def stored_stack(
    images: Tensor,
    *,
    store: TraceStore,
    victim: nn.Module,
    indices: Sequence[int],
    fit: FitOptions,
    decide: DecideOptions,
    stitch: StitchOptions,
    device: torch.device,
    also: Sequence[DecideOptions] = (),
    rules: Mapping[str, RuleAsked] | None = None,
    keys: StackKeys | None = None,
    logger: Logger | None = None,
    first_step: int = 0,
    callbacks: Sequence[pl.Callback] = (),
) -> StoredResult:
    """Defend B images (Algorithm 1), fitting those that the store does not hold.

    The traces are shared with later calls in this process and must not be changed.

    Args:
        images: x0, [B, 3, H, W] in [0, 1].
        store: Where fits are kept.
        victim: Takes [n, 3, H, W] in [0, 1], returns logits [n, C].
        indices: The images' indices.
        fit: How to fit.
        decide: What the victim sees; without ``patience``, which makes a fit's length depend on tau, t0 and K.
        stitch: How a trace becomes an image.
        device: Where to fit.
        also: Other numbers of steps and decisions that a fit made now shall serve.
        rules: Stopping rules whose choice is asked for too, by name.
        keys: The images' keys, where somebody has made them already.
        logger: A Lightning logger for the means over the stack.
        first_step: Added to the logger's step numbers.
        callbacks: More callbacks for a fit that is made now; it may hold fewer than B images, and longer than T.

    Raises:
        TypeError, ValueError: Bad images, options or victim.
    """
    if decide.patience is not None:
        raise ValueError(f"`patience` must be None where fits come from a store, got {decide.patience}")
    start = time.perf_counter()
    check_images(images)
    with torch.inference_mode(False), torch.no_grad():
        work = StackLookup(
            images.detach().clone() if images.is_inference() else images,
            store=store,
            victim=victim,
            indices=indices,
            fit=fit,
            decide=decide,
            device=device,
            also=also,
            rules=rules,
            keys=keys,
        )
        found = _all(work, callbacks)
        traces = [one.trace for one in found]
        if logger is not None:
            _log_means(logger, traces, first_step)
        begun = time.perf_counter()
        reconstructions = [stitch.apply(trace) for trace in traces]
    for one in found:
        store.counts[one.made] += 1
    seconds = dict(work.seconds)
    seconds["decide"] += time.perf_counter() - begun
    seconds["start"] = time.perf_counter() - start - seconds["fit"] - seconds["decide"]
    stopped = {name: stacked([one.choices[name] for one in found]) for name in work.rules}
    return StoredResult(traces, reconstructions, seconds, stopped, sum(one.spared for one in found))


def _all(work: StackLookup, callbacks: Sequence[pl.Callback]) -> list[Found]:
    """Every image, found or made; whoever else makes one of them is waited for."""
    found = {b: work.find(b) for b in range(len(work.keys.fits))}
    while missing := [b for b in found if found[b] is None]:
        with work.store.claim([work.keys.fits[b] for b in missing]) as mine:
            rows = [b for b in one_a_key(missing, work.keys.fits) if work.keys.fits[b] in mine]
            for b in rows:  # somebody may have made it since
                found[b] = work.find(b)
            rows = [b for b in rows if found[b] is None]
            if rows:
                found |= work.fit_rows(rows, callbacks)
        for b in missing:
            if found[b] is None:
                found[b] = work.find(b)
    return [one for one in found.values() if one is not None]


def _log_means(logger: Logger, traces: Sequence[DecisionTrace], first_step: int) -> None:
    """The curves of :class:`dipguard.fit.DecisionLogger`, whether or not the fit was made now."""
    steps = traces[0].steps.tolist()
    loss, quality = (torch.stack([getattr(t, name) for t in traces]).double().mean(0) for name in ("loss", "quality"))
    changed = torch.stack([t.decisions != t.given_decision for t in traces]).double().mean(0)
    # A crossing is localised once the second of its samples has been logged.
    found = torch.stack([torch.bincount(t.crossing_at + 2, minlength=len(steps) + 1) for t in traces]).cumsum(1)
    columns = (loss, quality, changed, found.double().mean(0))
    names = ("fit/mse", "fit/quality", "fit/decision_changed", "fit/crossings")
    for i, t in enumerate(steps):
        logger.log_metrics({n: float(c[i]) for n, c in zip(names, columns, strict=True)}, step=first_step + t)
