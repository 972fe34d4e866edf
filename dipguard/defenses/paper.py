"""The method of Ding et al. 2021 (Algorithm 1): stitch what a deep image prior shows at the decision boundary."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dipguard.checks import check_int
from dipguard.decision import DecisionTrace, Reconstruction, stitch
from dipguard.decision.intermediates import STITCHED, Intermediate
from dipguard.defenses.base import Purified
from dipguard.defenses.dip import DIPDefense
from dipguard.engines.base import say_once
from dipguard.fit import DecideOptions, FitProgress, StitchOptions, fit_stack
from dipguard.store import Store, open_store, stored_stack

_log = logging.getLogger(__name__)


class DIPGuard(DIPDefense):
    """A training-free defence: fit an untrained U-Net to each image, stitch what it shows at the decision boundary.

    The defaults are the settings of section 4.1 for CIFAR-10; ImageNet takes ``network="imagenet", T=3000``.

    Ding et al. show accuracy under transferred and identity-BPDA attacks. Purifiers with no more evidence than that
    have fallen to adaptive attacks (Athalye et al. 2018; Tramer et al. 2020; Croce et al. 2022).

    Args:
        T: Optimiser steps, at least 1.
        tau: Quality threshold of Eq. 3, in [0, 1].
        t0: Warm-up of Eq. 3, at least 0, in the unit ``t0_unit``.
        K: Largest number of on-boundary images that are stitched, at least 1.
        beta: Step size of Eq. 6, at least 0.
        decisions: Number of reconstructions along the fit that the victim classifies, at least 2; more than T means
            every step.
        every: Distance between those in steps, from 1 to T // 2, instead of their number.
        N: Sections of the grid of Eq. 5, at least 1.
        K_max: Largest K that the traces can be stitched with, at least K; None takes the larger of K and 25.
        scores: ``logits`` or ``probabilities`` (Eq. 5).
        rule: ``at_least`` (>=, Algorithm 1) or ``above`` (>, Eq. 3).
        t0_unit: ``steps`` or ``samples``.
        divide_by: ``found`` or ``K`` (Eq. 7 with fewer than K crossings).
        store: Folder of fits made earlier (:mod:`dipguard.store`), which other values of tau, t0, K, beta and T, and
            other victims, use again. Traces in the result are then shared and must not be changed. Not used for calls
            with ``callbacks``, which may change a fit.
        store_T: Other values of T that a fit made for the store is to serve.
        options: Those of :class:`~dipguard.defenses.dip.DIPDefense`.
    """

    name: ClassVar[str] = "paper"

    def __init__(
        self,
        victim: nn.Module,
        *,
        T: int = 1000,
        tau: float = 0.7,
        t0: int = 50,
        K: int = 15,
        beta: float = 0.5,
        decisions: int | None = 200,
        every: int | None = None,
        N: int = 10,
        K_max: int | None = None,
        scores: str = "logits",
        rule: str = "at_least",
        t0_unit: str = "steps",
        divide_by: str = "found",
        store: str | Path | Store | None = None,
        store_T: Sequence[int] = (),
        **options: Any,
    ) -> None:
        super().__init__(victim, **options)
        self.stitch_options = StitchOptions(
            tau=tau, t0=t0, K=K, beta=beta, rule=rule, t0_unit=t0_unit, divide_by=divide_by
        )
        decisions = None if every is not None else decisions
        K_max = max(K, 25) if K_max is None else check_int(K_max, name="K_max", low=K)
        self.decide_options = DecideOptions(T=T, decisions=decisions, every=every, N=N, scores=scores, K_max=K_max)
        end = len(self.decide_options.steps) if t0_unit == "samples" else T
        if t0 >= end:
            # Allowed, since the paper's own fallback covers it, but hardly ever meant: a short trial with the default.
            _log.warning("`t0`=%d is past the end of the fit (%d %s): no crossing can count", t0, end, t0_unit)
        self.store = open_store(store)
        if not isinstance(store_T, Sequence):
            raise TypeError(f"`store_T` must be a list of integers, got {store_T!r}")
        if store_T and self.store is None:
            raise ValueError(f"`store_T` needs a `store`, the folder of the fits that it is about, got {store_T!r}")
        self.also = tuple(replace(self.decide_options, T=other) for other in store_T)

    @property
    def settings(self) -> dict[str, Any]:
        """The options of fit, decisions and stitching."""
        return {**super().settings, **asdict(self.decide_options), **asdict(self.stitch_options)}

    @property
    def steps_per_purification(self) -> int:
        """T."""
        return self.decide_options.T

    @property
    def longest_fit(self) -> int:
        """T, or that of the longest fit that the store is to serve."""
        return max(options.T for options in (self.decide_options, *self.also))

    @property
    def images_kept(self) -> int:
        """What a trace holds; for the store, also the samples of everything that the fit is to serve."""
        if self.store is None:
            return self.decide_options.images_kept
        sampled = {step for options in (self.decide_options, *self.also) for step in options.steps}
        return self.decide_options.images_kept + len(sampled)

    @property
    def intermediate_views(self) -> dict[str, int]:
        """x(T), the mean of the on-boundary images that are stitched, and the stitched image."""
        return {"last": 1, "on_boundary": 1, STITCHED: 1}

    def rebuild(self, trace: DecisionTrace) -> Reconstruction:
        """Stitch an image again from its trace (Algorithm 1, lines 9-18)."""
        return stitch(trace, **asdict(self.stitch_options))

    def _purify_stack(self, images: Tensor, indices: list[int], run: dict[str, Any], *, first_step: int) -> Purified:
        """Fit one stack, or take it from the store, and stitch."""
        # Callbacks of the caller may change the fit, or want to see it: then it is neither looked up nor kept.
        others = [callback for callback in run["callbacks"] if not isinstance(callback, FitProgress)]
        store = None if others else self.store
        if store is not self.store:
            say_once("calls with `callbacks`, which may change a fit, do not use the store of fits")
        fit = fit_stack if store is None else partial(stored_stack, store=store, also=self.also)
        options: Any = {"fit": self.fit_options, "decide": self.decide_options, "stitch": self.stitch_options}
        made = fit(images, victim=self.victim, indices=indices, first_step=first_step, **options, **run)
        return Purified.stitched(made.reconstructions, like=images, traces=made.traces, seconds=made.seconds)

    def _intermediates(self, images: Tensor, indices: list[int]) -> dict[str, Intermediate]:
        """Fit once; without a crossing, ``on_boundary`` is what is stitched in its place."""
        made = self._purify(images, indices, callbacks=(), logger=None)
        boundary = []
        for trace in made.traces:
            stitched = self.rebuild(trace)
            boundary.append(trace.on_boundary[stitched.used].mean(dim=0) if len(stitched.used) else stitched.image)
        last = [trace.last[-1] for trace in made.traces]
        views = {"last": last, "on_boundary": boundary, STITCHED: list(made.reconstructions)}
        return {name: Intermediate(torch.stack(view)[None].to(images)) for name, view in views.items()}
