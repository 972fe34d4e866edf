"""Lightning callbacks: Algorithm 1, lines 4-19, which share ``module.trace``, and stopping rules."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain, pairwise
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dipguard.checks import check_choice, check_int
from dipguard.classifier import Decider, ask_together, steps_together
from dipguard.decision import DecisionTrace, Reconstruction, crosses, localise, quality, sampled_steps, stitch
from dipguard.decision.boundary import SCORES
from dipguard.decision.stopping import StopRule
from dipguard.fit.module import Crossing, Sample, StackedDIP, StackTrace
from dipguard.fit.options import StitchOptions

DECIDED = {"fit/crossings", "fit/decision_changed"}
"""Metrics that need the victim's decisions."""
Hook = TypeVar("Hook", bound=Callable[..., None])


def counted(hook: Hook) -> Hook:
    """A callback's hook whose time is added to its ``seconds``."""

    @functools.wraps(hook)
    def timed(self: Any, *args: Any) -> None:
        start = time.perf_counter()
        hook(self, *args)
        self.seconds += time.perf_counter() - start

    return timed  # type: ignore[return-value]


class DecisionLogger(pl.Callback):
    """Samples reconstructions along the fit and records the victim's decisions (Algorithm 1, lines 4-6 and 10).

    The first of the three callbacks: it opens ``module.trace``, to which the others add.

    Means over the stack go to the Trainer's loggers at each sampled step: ``fit/mse``, ``fit/quality`` (SSIM),
    ``fit/decision_changed`` (share of the images whose decision differs from that on x0) and ``fit/crossings`` (changes
    of decision so far, per image). ``trainer.callback_metrics`` hold the latest of them; at the end of each epoch the
    first two are those of its last step. ``seconds`` is the time spent here.

    In a stack of fewer than 64 images, samples wait until they make a good batch for the victim, so that the last two
    metrics lag behind. If a callback has one of them as its ``monitor``, the victim is asked at every sample.

    ``victim`` takes [n, 3, H, W] in [0, 1] and returns logits [n, C]; ``first_step`` is added to the step numbers of
    log entries, for several fits in one log. The other arguments are those of :class:`~dipguard.fit.DecideOptions`.
    TypeError or ValueError if one is out of range, or the module is no StackedDIP; RuntimeError if the fit ends before
    the first sampled step.
    """

    def __init__(
        self,
        victim: nn.Module,
        *,
        decisions: int | None = 200,
        every: int | None = None,
        K_max: int = 25,
        first_step: int = 0,
    ) -> None:
        self.decider = Decider(victim)
        self.decisions, self.every = decisions, every
        self.K_max = check_int(K_max, name="K_max", low=1)
        self.first_step = first_step
        self.seconds = 0.0
        self._steps: tuple[int, ...] = ()
        self._together = 1
        self._waiting: list[Sample] = []
        self._crossings = torch.zeros((), dtype=torch.float32, device="cpu")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the trace with the victim's decisions on the given images."""
        module = as_stacked_dip(pl_module)
        self._steps = sampled_steps(module.T, decisions=self.decisions, every=self.every)
        self._waiting, self.seconds = [], 0.0
        self._crossings = module.given.new_zeros(())
        monitored = (getattr(callback, "monitor", None) for callback in getattr(trainer, "callbacks", ()))
        names = chain.from_iterable((one,) if isinstance(one, str) else one or () for one in monitored)
        self._together = 1 if DECIDED.intersection(names) else steps_together(len(module.given))
        # The Trainer's precision may have changed the dtype.
        about = {**module.options.as_settings(), "dtype": str(module.given.dtype).removeprefix("torch."), "T": module.T}
        own = {name: getattr(self, name) for name in ("decisions", "every", "K_max")}
        given_scores = self.decider(module.given)
        module.trace = StackTrace(module.given, given_scores, module.indices, self.K_max, {**about, **own})
        trainer.callback_metrics["fit/crossings"] = self._crossings

    @counted
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """Sample x(t), which was made before this step's update; ask the victim when enough samples wait."""
        step, x, errors = step_output(outputs)
        module = as_stacked_dip(pl_module)
        sampled, last = step in self._steps, step == module.T - 1
        if sampled:
            value = quality(x, module.given)
            trainer.callback_metrics.update({"fit/mse": errors.mean(), "fit/quality": value.mean()})
            # Copies: an engine may write its next step into the same memory.
            self._waiting.append(Sample(step, x.clone(), x.new_empty(0), value, errors.clone()))
        if last or len(self._waiting) >= self._together:
            self._ask(trainer, module)

    @counted
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask about the samples that still wait."""
        module = as_stacked_dip(pl_module)
        self._ask(trainer, module)
        if not opened(module).steps:
            raise RuntimeError(
                f"the fit ended after {module.step} of {module.T} steps, before the first sample at step "
                f"{self._steps[0]}: sample more often (`decisions`, `every`) or fit longer"
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """After Ctrl-C, log what has been sampled; other errors may be the victim's own, or a lack of memory."""
        if isinstance(exception, KeyboardInterrupt):
            self._ask(trainer, as_stacked_dip(pl_module))

    def _ask(self, trainer: pl.Trainer, module: StackedDIP) -> None:
        """Show the waiting samples to the victim in one batch; record and log them."""
        if not self._waiting:
            return
        parts = ask_together(self.decider, [sample.reconstructions for sample in self._waiting])
        samples = [sample._replace(scores=scores) for sample, scores in zip(self._waiting, parts, strict=True)]
        self._waiting = []
        trace = opened(module)
        trace.add(samples)
        previous = trace.recent[0].scores
        for sample in samples:
            self._crossings = self._crossings + crosses(previous.argmax(1), sample.scores.argmax(1)).sum()
            previous = sample.scores
            changed = crosses(trace.given_scores.argmax(1), previous.argmax(1)).to(sample.errors)
            decided = {"fit/decision_changed": changed.mean(), "fit/crossings": self._crossings / len(changed)}
            if trainer.loggers:
                means = {"fit/mse": sample.errors.mean(), "fit/quality": sample.quality.mean(), **decided}
                figures = dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))
                for logger in trainer.loggers:
                    logger.log_metrics(figures, step=self.first_step + sample.step)
        trainer.callback_metrics.update(decided)


class BoundaryDetector(pl.Callback):
    """Finds cross-boundary pairs as they are sampled, and their on-boundary images (Algorithm 1, lines 11-14).

    The second of the three callbacks. A pair is kept when it is found, and localised when the fit is over: many pairs
    are dropped before that, because no replay can select them. The thresholds tau and t0 of Eq. 3 are not applied here
    but in the stitch, so that a trace serves all of them. ``seconds`` is the time spent here.

    ``victim`` takes [n, 3, H, W] in [0, 1] and returns logits [n, C]; ``N``, at least 1, are the sections of the grid
    of Eq. 5, and ``scores`` its f_c, ``logits`` or ``probabilities``. TypeError or ValueError if one is out of range,
    or the module is no StackedDIP; RuntimeError without a DecisionLogger before this callback.
    """

    def __init__(self, victim: nn.Module, *, N: int = 10, scores: str = "logits") -> None:
        self.decider = Decider(victim)
        self.N = check_int(N, name="N", low=1)
        self.scores = check_choice(scores, SCORES, name="scores")
        self.seconds = 0.0
        self._seen = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the options in the trace."""
        self._seen, self.seconds = 0, 0.0
        opened(pl_module).settings |= {"N": self.N, "scores": self.scores}

    @counted
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """Compare the samples that have become known with their predecessors."""
        self._detect(opened(pl_module))

    @counted
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Detect the last pairs, and localise all pairs of all images."""
        trace = opened(pl_module)
        self._detect(trace)
        found = trace.needed_crossings()
        # One batch of the victim at a time: the grid's images of all pairs would take some hundred megabytes.
        size = max(1, self.decider.batch(*trace.given.shape[-2:]) // max(1, self.N - 1))
        parts = [self._localise(found[first : first + size]) for first in range(0, len(found), size)]
        if parts:
            trace.boundary = torch.cat([alpha for alpha, _ in parts]), torch.cat([images for _, images in parts])

    def _detect(self, trace: StackTrace) -> None:
        if len(trace.steps) == self._seen:
            return
        first, self._seen = len(trace.steps) - len(trace.recent), len(trace.steps)
        for i, (before, after) in enumerate(pairwise(trace.recent), first):
            which = torch.nonzero(crosses(before.scores.argmax(1), after.scores.argmax(1))).flatten()
            if len(which):
                trace.add_crossings(i, which, before, after)

    def _localise(self, found: Sequence[Crossing]) -> tuple[Tensor, Tensor]:
        (x, x_next), (f, f_next) = torch.stack([c.images for c in found], 1), torch.stack([c.scores for c in found], 1)
        return localise(x, x_next, f, f_next, self.decider, N=self.N, scores=self.scores)


class Stitcher(pl.Callback):
    """Makes one decision trace and the final reconstruction of each image (Algorithm 1, lines 17-19).

    The last of the three callbacks. Its arguments are those of :class:`~dipguard.fit.StitchOptions`. After the fit,
    ``traces`` and ``reconstructions`` hold one entry per image, and ``seconds`` is the time spent here. TypeError or
    ValueError if an option is out of range, or K is above the DecisionLogger's ``K_max``; RuntimeError without a
    DecisionLogger and a BoundaryDetector before this callback.
    """

    def __init__(self, *, tau: float, t0: int, K: int, beta: float, **choices: str) -> None:
        self.options = StitchOptions(tau=tau, t0=t0, K=K, beta=beta, **choices)
        self.traces: list[DecisionTrace] = []
        self.reconstructions: list[Reconstruction] = []
        self.seconds = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the options in the trace."""
        self.traces, self.reconstructions, self.seconds = [], [], 0.0
        trace = opened(pl_module, detected=True)
        check_int(self.options.K, name="K", low=1, high=trace.K_max)
        trace.settings |= asdict(self.options)

    @counted
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the trace and stitch each image."""
        module = as_stacked_dip(pl_module)
        trace = opened(module)
        if module.step < module.T:
            trace.settings["ended_after"] = module.step
        self.traces = trace.close()
        self.reconstructions = [stitch(one, **asdict(self.options)) for one in self.traces]


class StopRuleCallback(pl.Callback):
    """Shows every step of a fit to a fresh stopping rule, whose ``result`` is there afterwards; changes nothing else.

    The Trainer's loggers get ``fit/mse`` and ``fit/quality`` (SSIM), means over the stack, at about 50 steps, to whose
    numbers ``first_step`` is added.
    """

    def __init__(self, rule: StopRule, *, first_step: int = 0) -> None:
        self.rule, self.first_step = rule, first_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """Show x(t), which was made before this step's update, to the rule."""
        given = as_stacked_dip(pl_module).given
        step, x, errors = step_output(outputs)
        self.rule.update(step, x, given)
        if trainer.loggers and (step + 1) % max(1, trainer.max_steps // 50) == 0:
            means = {"fit/mse": float(errors.mean()), "fit/quality": float(quality(x, given).mean())}
            for logger in trainer.loggers:
                logger.log_metrics(means, step=self.first_step + step)


def as_stacked_dip(pl_module: pl.LightningModule) -> StackedDIP:
    """Return the module if it is a StackedDIP, else raise TypeError."""
    if not isinstance(pl_module, StackedDIP):
        raise TypeError(f"this callback works on a StackedDIP, got {type(pl_module).__name__}")
    return pl_module


def step_output(outputs: Any) -> tuple[int, Tensor, Tensor]:
    """The step t, x(t) and the errors of a training step, detached; TypeError if a subclass returned something else."""
    try:
        return int(outputs["step"]), outputs["reconstructions"].detach(), outputs["errors"].detach()
    except (KeyError, TypeError, IndexError) as error:
        raise TypeError(
            "`training_step` must return the dict of StackedDIP.training_step, with any other `loss`, got "
            f"{sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__}"
        ) from error


def opened(pl_module: pl.LightningModule, *, detected: bool = False) -> StackTrace:
    """The trace that a DecisionLogger has opened (``detected``: a BoundaryDetector adds to); RuntimeError without."""
    trace = as_stacked_dip(pl_module).trace
    if trace is None or (detected and "N" not in trace.settings):
        missing = "DecisionLogger" if trace is None else "BoundaryDetector"
        raise RuntimeError(
            "`callbacks` must have DecisionLogger before BoundaryDetector, and both before Stitcher, got no "
            f"{missing} there"
        )
    return trace
