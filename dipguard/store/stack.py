"""A stacked fit that is looked up first: the store's counterpart of :func:`dipguard.fit.fit_stack`.

Only images that the store does not hold are fitted, each by one process alone. x(t) depends neither on T nor on how
often the victim is asked, so one long fit, sampled at the steps of every shorter one (``also``), serves them all, bit
by bit with the native engine; with the others, rounding depends on the number of images in a stack.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor, nn

from dipguard.classifier import Decider, device_of
from dipguard.decision import DecisionTrace, crosses, needed_for_replay
from dipguard.decision import stitch as stitch_trace
from dipguard.fit import DecideOptions, FitOptions, StackResult, StitchOptions
from dipguard.fit.options import trace_settings
from dipguard.fit.replay import FitSamples, decide_samples, fit_samples
from dipguard.fit.runner import isolated_trainer
from dipguard.store.folder import Entry, Store
from dipguard.store.keys import StackKeys

_log = logging.getLogger(__name__)

SAME_LOGITS = 0.01
"""Largest difference, relative to the largest logit, that rounding may make between two calls of one victim."""


def stored_stack(
    images: Tensor,
    *,
    store: Store,
    victim: nn.Module,
    indices: Sequence[int],
    fit: FitOptions,
    decide: DecideOptions,
    stitch: StitchOptions,
    device: torch.device,
    also: Sequence[DecideOptions] = (),
    logger: Logger | None = None,
    first_step: int = 0,
    callbacks: Sequence[pl.Callback] = (),
    trainer: Mapping[str, Any] | None = None,
) -> StackResult:
    """Defend B images (Algorithm 1), fitting those that the store does not hold.

    The arguments are those of :func:`dipguard.fit.fit_stack`, and ``also``: further decisions that a fit made now is to
    serve, such as those of other T. Such a fit may have fewer than B images and more than T steps. The seconds are
    those that fits and decisions took when they were made. A defence calls this outside of inference mode, with images
    that it has checked. TypeError or ValueError for bad options or a bad victim.
    """
    start = time.perf_counter()
    keys = StackKeys(images, indices=indices, fit=fit, T=decide.T, device=device, trainer=trainer)
    work = _Stack(images, indices, store, Decider(victim), keys, fit, decide, also)
    found = work.find_or_fit(device=device, callbacks=callbacks, trainer=trainer)
    traces = [_as_asked(one.trace, trace_settings(fit, decide, stitch)) for one in found]
    if logger is not None:
        _log_means(logger, traces, first_step)
    begun = time.perf_counter()
    reconstructions = [stitch_trace(trace, **asdict(stitch)) for trace in traces]
    store.counts.update(one.made for one in found)
    seconds = {**work.seconds, "decide": work.seconds["decide"] + time.perf_counter() - begun}
    seconds["start"] = time.perf_counter() - start - work.waited - seconds["fit"] - seconds["decide"]
    seconds["fit"] += sum(one.spared for one in found)
    return StackResult(traces, reconstructions, seconds)


class _Found(NamedTuple):
    """An image's trace, the seconds that its fit took earlier, and how it came about: the name of a count."""

    trace: DecisionTrace
    spared: float
    made: str


@dataclass(eq=False)
class _Stack:
    """B images on their way from key to trace."""

    images: Tensor
    indices: Sequence[int]
    store: Store
    victim: Decider
    keys: StackKeys
    fit: FitOptions
    decide: DecideOptions
    also: Sequence[DecideOptions]

    def __post_init__(self) -> None:
        # A longer fit serves a shorter one only if both have the same engine.
        served = [self.decide, *(o for o in self.also if self.keys.engine_at(o.T) == self.keys.engine)]
        self.trace_keys = {options: self.keys.traces(self.victim.victim, options) for options in served}
        self.seconds = {"start": 0.0, "fit": 0.0, "decide": 0.0}
        self.waited = 0.0  # seconds for other processes, whose fits are counted as their own
        self._same_victim: bool | None = None

    def find_or_fit(self, **run: Any) -> list[_Found]:
        """Every image; those that another process is fitting are waited for."""
        fits = self.keys.fits
        found = {b: self._find(b) for b in range(len(fits))}
        while missing := [b for b in found if found[b] is None]:
            begun = time.perf_counter()
            with self.store.claim([fits[b] for b in missing]) as mine:
                self.waited += time.perf_counter() - begun
                first = {fits[b]: b for b in reversed(missing)}  # an image that comes twice is fitted once
                rows = sorted(b for key, b in first.items() if key in mine)
                found |= {b: self._find(b) for b in rows}  # another process may have made it in the meantime
                rows = [b for b in rows if found[b] is None]
                if rows:
                    found |= self._fit(rows, **run)
            found |= {b: self._find(b) for b in missing if found[b] is None}
        return [one for one in found.values() if one is not None]

    def _find(self, b: int) -> _Found | None:
        """Image b without a fit, or None."""
        stored = self._read_trace(b)
        if stored is not None:
            return _Found(*stored, "replayed")
        fitted = self._read_samples(b)
        if fitted is None or not fitted[0].covers(self.decide.steps):
            return None
        samples, seconds = fitted
        return _Found(self._decide(b, samples, self.decide, seconds=seconds), seconds, "decided")

    def _fit(self, rows: list[int], **run: Any) -> dict[int, _Found]:
        """Fit these images in one stack, and store their fits and traces."""
        steps = {step for options in self.trace_keys for step in options.steps}
        for b in rows:  # the new fit replaces the old one and must serve what that served
            old = self._read_samples(b) if self.store.keep_samples else None
            steps |= set() if old is None else set(old[0].steps.tolist())
        fits, seconds = fit_samples(
            self.images[rows],
            steps=steps,
            T=max(*(options.T for options in self.trace_keys), max(steps) + 1),
            indices=[self.indices[b] for b in rows],
            fit=replace(self.fit, engine=self.keys.engine),
            **run,
        )
        for part, value in seconds.items():
            self.seconds[part] += value
        share = sum(seconds.values()) / len(rows)
        return {b: _Found(self._keep(b, samples, share), 0.0, "fitted") for b, samples in zip(rows, fits, strict=True)}

    def _keep(self, b: int, samples: FitSamples, seconds: float) -> DecisionTrace:
        if self.store.keep_samples:
            arrays = {name: tensor.numpy() for name, tensor in vars(samples).items()}
            self.store.write("fits", self.keys.fits[b], arrays, {"seconds": seconds})
        # Without samples nothing else could serve the other T.
        kept = (self.decide,) if self.store.keep_samples else self.trace_keys
        traces = [self._decide(b, samples, options, seconds=seconds) for options in kept]
        return traces[0]

    def _decide(self, b: int, samples: FitSamples, decide: DecideOptions, *, seconds: float) -> DecisionTrace:
        """The trace of a fit; stored without the given image, which every reader has."""
        start = time.perf_counter()
        own: dict[str, Any] = {"given": self.images[b], "index": int(self.indices[b]), "victim": self.victim}
        with isolated_trainer(device_of(self.victim.victim)):  # in the precision of a fit without a store
            trace = decide_samples(samples, fit=self.fit, decide=decide, **own)
        spent = time.perf_counter() - start
        self.seconds["decide"] += spent
        arrays = {name: tensor.cpu().numpy() for name, tensor in trace.tensors().items() if name != "given"}
        about = {"settings": trace.settings, "seconds": seconds + spent}
        self.store.write("traces", self.trace_keys[decide][b], arrays, about)
        return trace

    def _read_trace(self, b: int) -> tuple[DecisionTrace, float] | None:
        """The stored trace of image b and its seconds, if it serves these decisions of this victim."""

        def parse(entry: Entry) -> tuple[DecisionTrace, float] | None:
            tensors = {name: torch.from_numpy(array) for name, array in entry.arrays.items()}
            given = self.images[b].to(device="cpu", dtype=tensors["last"].dtype, copy=True)
            trace = DecisionTrace(int(self.indices[b]), given, settings=entry.header["settings"], **tensors)
            return (trace, float(entry.header["seconds"])) if trace.K_max >= self.decide.K_max else None

        found = self.store.read_as("traces", self.trace_keys[self.decide][b], parse)
        if found is not None and self._same_victim is None:
            self._same_victim = self._answers_as(found[0])
        return found if self._same_victim else None

    def _answers_as(self, trace: DecisionTrace) -> bool:
        """Whether the victim gives the logits of the trace, which no digest of a module can guarantee."""
        with isolated_trainer(device_of(self.victim.victim)):
            logits = self.victim(trace.given[None])[0].cpu()
        stored = trace.given_scores
        limit = SAME_LOGITS * max(1.0, float(stored.abs().max()))
        same = logits.shape == stored.shape and bool((logits - stored).abs().max() <= limit)
        if not same:
            _log.warning("a victim with modules and weights of one in the store answers otherwise: it is asked again")
        return same

    def _read_samples(self, b: int) -> tuple[FitSamples, float] | None:
        def parse(entry: Entry) -> tuple[FitSamples, float]:
            samples = FitSamples(**{name: torch.from_numpy(array) for name, array in entry.arrays.items()})
            size, got = (len(samples.steps), *self.images.shape[1:]), tuple(samples.images.shape)
            if got != size or not size[:1] == samples.quality.shape == samples.loss.shape:
                raise ValueError(f"`images` must have shape {size}, got {got}")
            return samples, float(entry.header["seconds"])

        return self.store.read_as("fits", self.keys.fits[b], parse)


def _as_asked(trace: DecisionTrace, settings: dict[str, Any]) -> DecisionTrace:
    """The trace that a fit with these settings would have left; their ``K_max`` is at most the trace's."""
    K_max = int(settings["K_max"])
    if K_max == trace.K_max:
        return replace(trace, settings=settings)
    # For each crossing that the larger K_max has dropped, enough later ones of at least its quality are kept that the
    # smaller K_max drops it too: pruning twice loses nothing.
    kept = needed_for_replay(trace.quality[trace.crossing_at].double(), K_max=K_max)
    pruned = {name: getattr(trace, name)[kept] for name in ("crossing_at", "alpha", "on_boundary")}
    return replace(trace, last=trace.last[-K_max:], settings=settings, **pruned)


def _log_means(logger: Logger, traces: Sequence[DecisionTrace], first_step: int) -> None:
    """The curves of :class:`dipguard.fit.DecisionLogger`, whether or not the fit was made now."""
    loss, quality = (torch.stack([getattr(t, name) for t in traces]).double().mean(0) for name in ("loss", "quality"))
    decisions = torch.stack([trace.decisions for trace in traces])
    given = torch.tensor([trace.given_decision for trace in traces], device="cpu")
    changed = (decisions != given[:, None]).double().mean(0)
    crossed = crosses(decisions[:, :-1], decisions[:, 1:]).double().mean(0).cumsum(0)
    names = ("fit/mse", "fit/quality", "fit/decision_changed", "fit/crossings")
    rows = torch.stack([loss, quality, changed, torch.cat([crossed.new_zeros(1), crossed])], dim=1)
    for step, row in zip(traces[0].steps.tolist(), rows.tolist(), strict=True):
        logger.log_metrics(dict(zip(names, row, strict=True)), step=first_step + step)
