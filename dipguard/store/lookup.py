"""One stack of images in the store: what is there already, what follows from it, and the fit of the rest."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dipguard.decision import DecisionTrace, sampled_steps
from dipguard.fit import DecideOptions, Decider, FitOptions
from dipguard.fit.redecide import decide_samples, trace_settings
from dipguard.fit.samples import FitSamples, fit_samples
from dipguard.fit.stop_rules import StopRules
from dipguard.store.folder import TraceStore
from dipguard.store.stack_keys import StackKeys
from dipguard.store.stopped import Choice, RuleAsked, read_choice, write_choice
from dipguard.store.traces import Kept, as_asked, read_samples, read_trace, write_samples, write_trace

_log = logging.getLogger(__name__)

SAME_LOGITS = 0.01
"""Largest difference, relative to the largest logit, that rounding may make between two calls of one victim."""


@dataclass(frozen=True, eq=False)
class Found:
    """What the store gives for one image.

    Attributes:
        trace: As it was asked for.
        choices: What the rules chose, by name.
        spared: Seconds that the fit, and its decisions, took when they were made, which was not now.
        made: ``fitted``, ``decided`` (from kept samples) or ``replayed``.
    """

    trace: DecisionTrace
    choices: dict[str, Choice]
    spared: float
    made: str


class StackLookup:
    """B images, their keys, and the steps from key to trace.

    Args: as those of :func:`dipguard.store.serve.stored_stack`.

    Attributes:
        keys: Their keys.
        seconds: What was spent on fits (``fit``, with their ``start``) and on decisions (``decide``).
    """

    def __init__(
        self,
        images: Tensor,
        *,
        store: TraceStore,
        victim: nn.Module,
        indices: Sequence[int],
        fit: FitOptions,
        decide: DecideOptions,
        device: torch.device,
        also: Sequence[DecideOptions] = (),
        rules: Mapping[str, RuleAsked] | None = None,
        keys: StackKeys | None = None,
    ) -> None:
        self.images = images
        self.store, self.fit, self.decide, self.device = store, fit, decide, device
        self.rules = dict(rules or {})
        self.decider, self.victim = Decider(victim), victim
        self.keys = keys or StackKeys(images, indices=indices, fit=fit, T=decide.T, device=device)
        # A longer fit serves a shorter one only where both have the same engine.
        self.also = [options for options in also if self.keys.engine_at(options.T) == self.keys.engine]
        self.settings = trace_settings(fit, decide)
        self._trusted: bool | None = None
        self.seconds = {"start": 0.0, "fit": 0.0, "decide": 0.0}

    def find(self, b: int) -> Found | None:
        """Image b without a fit, or None."""
        choices = {}
        for name, asked in self.rules.items():
            choice = read_choice(self.store, self.keys.fits[b], asked)
            if choice is None:
                return None
            choices[name] = choice
        fitted: FitSamples | None = None
        kept = self._trace(b)
        made, spared = "replayed", 0.0 if kept is None else kept.seconds
        if kept is None or self.decide.keep_samples:
            stored = read_samples(self.store, self.keys.fits[b])
            if stored is None or not stored[0].covers(_schedule(self.decide)):
                return None
            fitted = stored[0]
            if kept is None:
                kept = self._decide(b, fitted, self.decide, seconds=stored[1])
                made, spared = "decided", stored[1]
        return Found(self._as_asked(kept.trace, fitted), choices, spared, made)

    def fit_rows(self, rows: list[int], callbacks: Sequence[pl.Callback]) -> dict[int, Found]:
        """Fit these images in one stack, and keep what their fits leave."""
        steps = {step for options in (self.decide, *self.also) for step in _schedule(options)}
        lengths = [self.decide.T, *(options.T for options in self.also), *(asked.T for asked in self.rules.values())]
        for b in rows:
            old = read_samples(self.store, self.keys.fits[b])
            if old is not None:  # what the new fit replaces it must be able to serve
                steps |= set(old[0].steps.tolist())
        T = max(*lengths, max(steps) + 1)
        watchers = {name: StopRules({name: asked.make()}, until=asked.T) for name, asked in self.rules.items()}
        samples, seconds = fit_samples(
            self.images[rows],
            steps=steps,
            T=T,
            indices=[self.keys.indices[b] for b in rows],
            fit=replace(self.fit, engine=self.keys.engine),
            device=self.device,
            callbacks=[*watchers.values(), *callbacks],
        )
        for part, value in seconds.items():
            self.seconds[part] += value
        share = sum(seconds.values()) / len(rows)
        found = {}
        for place, (b, fitted) in enumerate(zip(rows, samples, strict=True)):
            choices = {}
            for name, watcher in watchers.items():
                stopped = watcher.stopped[name]
                choices[name] = Choice(stopped.images[place].cpu(), int(stopped.steps[place]), share)
                write_choice(self.store, self.keys.fits[b], self.rules[name], choices[name], self.keys.about(b))
            found[b] = Found(self._keep(b, fitted, share), choices, 0.0, "fitted")
        return found

    def _keep(self, b: int, fitted: FitSamples, seconds: float) -> DecisionTrace:
        """Write a new fit and its trace; without the samples, also the traces that somebody will ask for."""
        samples_too = self.store.keep_samples or self.decide.keep_samples
        if samples_too:
            write_samples(self.store, self.keys.fits[b], fitted, {**self.keys.about(b), "seconds": seconds})
        kept = self._decide(b, fitted, self.decide, seconds=seconds)
        if not samples_too:
            for options in self.also:
                self._decide(b, fitted, options, seconds=seconds)
        return self._as_asked(kept.trace, fitted)

    def _trace(self, b: int) -> Kept | None:
        """The stored trace of image b, if there is one that serves and this victim is the one that was asked."""
        key = self.keys.traces(self.victim, self.decide)[b]
        kept = read_trace(self.store, key, given=self.images[b], index=self.keys.indices[b])
        if kept is None or kept.trace.K_max < self.decide.K_max:
            return None
        if self._trusted is None:
            self._trusted = self._is_same_victim(b, kept.trace)
        return kept if self._trusted else None

    def _is_same_victim(self, b: int, trace: DecisionTrace) -> bool:
        """Whether the victim still says what the trace says, which no digest of a module can promise."""
        said = self.keys.logits if b == 0 else None
        logits = (self.decider(self.images[b : b + 1]) if said is None else said)[0].cpu()
        scale = max(1.0, float(trace.given_scores.abs().max()))
        same = logits.shape == trace.given_scores.shape and bool(
            (logits - trace.given_scores).abs().max() <= SAME_LOGITS * scale
        )
        if not same:
            _log.warning(
                "a victim with the same parts and weights as one in the store answers otherwise: its decisions are made"
                " again"
            )
        return same

    def _decide(self, b: int, fitted: FitSamples, decide: DecideOptions, *, seconds: float) -> Kept:
        start = time.perf_counter()
        options = replace(decide, keep_samples=False)
        trace = decide_samples(
            fitted, given=self.images[b], index=self.keys.indices[b], victim=self.decider, fit=self.fit, decide=options
        )
        spent = time.perf_counter() - start
        key = self.keys.traces(self.victim, decide)[b]
        kept = write_trace(self.store, key, trace, self.keys.about(b), seconds + spent)
        self.seconds["decide"] += time.perf_counter() - start
        return kept

    def _as_asked(self, trace: DecisionTrace, fitted: FitSamples | None) -> DecisionTrace:
        asked = as_asked(trace, self.settings)
        if not self.decide.keep_samples:
            return asked
        assert fitted is not None
        return replace(asked, samples=fitted.at(_schedule(self.decide)).images)


def _schedule(decide: DecideOptions) -> tuple[int, ...]:
    return sampled_steps(decide.T, decisions=decide.decisions, every=decide.every)
