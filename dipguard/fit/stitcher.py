"""Makes the decision traces and the final reconstructions when the fit is over (Algorithm 1, lines 17-19)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl

from dipguard.checks import check_choice, check_float, check_int
from dipguard.decision import DecisionTrace, Reconstruction, stitch
from dipguard.decision.boundary import RULES, T0_UNITS
from dipguard.decision.stitching import DIVISORS
from dipguard.fit.decision_logger import as_stacked_dip, open_records


@dataclass(frozen=True, kw_only=True)
class StitchOptions:
    """How a trace becomes an image (section 4.1), and the readings that the paper leaves open.

    Attributes:
        tau: Quality threshold, in [0, 1].
        t0: Warm-up, at least 0.
        K: Number of on-boundary images, at least 1.
        beta: Step size of Eq. 6, at least 0.
        rule: ``at_least`` (>=, Algorithm 1) or ``above`` (>, Eq. 3).
        t0_unit: ``steps`` or ``samples``.
        divide_by: ``found`` or ``K`` (Eq. 7, when fewer than K crossings exist).
    """

    tau: float = 0.7
    t0: int = 50
    K: int = 15
    beta: float = 0.5
    rule: str = "at_least"
    t0_unit: str = "steps"
    divide_by: str = "found"

    def __post_init__(self) -> None:
        check_float(self.tau, name="tau", low=0.0, high=1.0)
        check_int(self.t0, name="t0", low=0)
        check_int(self.K, name="K", low=1)
        check_float(self.beta, name="beta", low=0.0)
        check_choice(self.rule, RULES, name="rule")
        check_choice(self.t0_unit, T0_UNITS, name="t0_unit")
        check_choice(self.divide_by, DIVISORS, name="divide_by")

    def apply(self, trace: DecisionTrace) -> Reconstruction:
        """Stitch one image from its trace."""
        return stitch(trace, **vars(self))


class Stitcher(pl.Callback):
    """The last of the three callbacks.

    Args:
        options: See :class:`StitchOptions`.
        settings: What the traces shall say of the fit besides the module's own options.

    Attributes:
        traces: One decision trace an image, after the fit.
        reconstructions: What each image was rebuilt from, after the fit.
        seconds: Time spent here.
    """

    def __init__(self, options: StitchOptions | None = None, *, settings: Mapping[str, Any] | None = None) -> None:
        self.options = StitchOptions() if options is None else options
        self.settings = dict(settings or {})
        self.traces: list[DecisionTrace] = []
        self.reconstructions: list[Reconstruction] = []
        self.seconds = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to start without DecisionLogger before this callback, or with K above its K_max."""
        for _, record in open_records(as_stacked_dip(pl_module)):
            check_int(self.options.K, name="K", low=1, high=record.K_max)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the records into traces, in the order in which the images came; stitch them."""
        start = time.perf_counter()
        module = as_stacked_dip(pl_module)
        settings = {**module.options.as_settings(), "T": module.T, **self.settings}
        placed: dict[int, DecisionTrace] = {}
        for cohort in (*module.finished, *module.cohorts):
            if cohort.record is not None:
                placed |= zip(cohort.places, cohort.record.traces(settings), strict=True)
                cohort.record = None
        self.traces = [placed[place] for place in sorted(placed)]
        self.reconstructions = [self.options.apply(trace) for trace in self.traces]
        self.seconds += time.perf_counter() - start
