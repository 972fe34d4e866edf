"""Options of a stacked fit, of its decisions and of the stitch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dipguard.checks import check_bool, check_choice, check_float, check_int, check_positive
from dipguard.decision import sampled_steps
from dipguard.decision.boundary import SCORES, T0_UNITS, check_thresholds
from dipguard.decision.stitching import DIVISORS
from dipguard.engines import check_matmul_precision
from dipguard.networks import INITS, PADDINGS, NetworkSpec, network_spec

DTYPES = ("float32", "float64")
Z_KINDS = ("uniform", "gaussian")


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How the DIP networks are fitted: appendix B, and the choices that the paper leaves open.

    TypeError or ValueError if an option is out of range; the message names it.

    Attributes:
        network: A preset of appendix B (``cifar10``, ``imagenet``, ``small``, ``medium``, ``large``), or a spec.
        seed: Seed of weights, z and jitter.
        z: Distribution of the networks' input z, ``uniform`` (appendix B) or ``gaussian`` (section 3.1).
        z_scale: Upper end or standard deviation of z, above 0; None takes the preset's (appendix B).
        jitter: Standard deviation of the noise added to z at each step, at least 0.
        init: Initial weights, ``default`` (PyTorch's) or ``xavier`` (Algorithm 1, line 1).
        padding: Of the convolutions, ``zeros`` or ``reflect``.
        lr: Adam's learning rate, above 0 (appendix B: 0.01, no decay).
        dtype: ``float32`` or ``float64``.
        engine: What computes a step, ``auto``, ``torch``, ``native`` or ``cuda_graph``
            (:func:`dipguard.engines.make_engine`).
        dead_zone: Errors of a pixel up to this many times the noise of its image
            (:func:`~dipguard.decision.quality.image_noise`) cost nothing; of a larger error, the excess is squared. At
            least 0; 0 gives the mean squared error of Eq. 2.
        optimise_z: Optimise z together with the weights, as Dai et al. 2020 (DIPDefend) do; Ding et al. keep z fixed.
        matmul_precision: ``float32``, or ``tf32`` or ``bfloat16`` for convolutions with the engines ``torch`` and
            ``cuda_graph`` (:func:`dipguard.precision.precision`). The last two change results.
    """

    network: str | NetworkSpec = "cifar10"
    seed: int = 0
    z: str = "uniform"
    z_scale: float | None = None
    jitter: float = 0.0
    init: str = "default"
    padding: str = "zeros"
    lr: float = 0.01
    dtype: str = "float32"
    engine: str = "auto"
    dead_zone: float = 0.0
    optimise_z: bool = False
    matmul_precision: str = "float32"

    def __post_init__(self) -> None:
        network_spec(self.network)
        check_int(self.seed, name="seed", low=0)
        check_float(self.jitter, name="jitter", low=0.0)
        check_choice(self.z, Z_KINDS, name="z")
        if self.z_scale is not None:
            check_positive(self.z_scale, name="z_scale")
        check_choice(self.init, INITS, name="init")
        check_choice(self.padding, PADDINGS, name="padding")
        check_positive(self.lr, name="lr")
        check_choice(self.dtype, DTYPES, name="dtype")
        check_matmul_precision(self.matmul_precision, engine=self.engine)
        if self.matmul_precision != "float32" and self.dtype != "float32":
            raise ValueError(
                f"`matmul_precision` {self.matmul_precision!r} needs `dtype` 'float32', got {self.dtype!r}"
            )
        check_float(self.dead_zone, name="dead_zone", low=0.0)
        check_bool(self.optimise_z, name="optimise_z")

    @property
    def spec(self) -> NetworkSpec:
        """The network's spec."""
        return network_spec(self.network)

    @property
    def scale_of_z(self) -> float:
        """``z_scale``, or the preset's."""
        return self.spec.z_scale if self.z_scale is None else self.z_scale

    def as_settings(self) -> dict[str, Any]:
        """The options as JSON values, with ``z_scale`` resolved."""
        settings = {**asdict(self), "z_scale": self.scale_of_z}
        if not isinstance(self.network, str):
            spec = asdict(self.network)
            settings["network"] = {key: list(v) if isinstance(v, tuple) else v for key, v in spec.items()}
        return settings


@dataclass(frozen=True, kw_only=True)
class DecideOptions:
    """Which reconstructions the victim classifies, and what is kept of them; errors are those of `FitOptions`.

    Attributes:
        T: Optimiser steps, at least 1 (section 4.1: 1000 on CIFAR-10, 3000 on ImageNet).
        decisions: Number of sampled steps, at least 2; more than T samples every step.
        every: Distance between sampled steps, from 1 to T // 2, instead of their number.
        N: Sections of the grid of Eq. 5, at least 1.
        scores: f_c of Eq. 5, ``logits`` or ``probabilities``.
        K_max: The largest K that a trace can be replayed with, at least 1.
    """

    T: int = 1000
    decisions: int | None = 200
    every: int | None = None
    N: int = 10
    scores: str = "logits"
    K_max: int = 25

    def __post_init__(self) -> None:
        sampled_steps(self.T, decisions=self.decisions, every=self.every)
        check_int(self.N, name="N", low=1)
        check_choice(self.scores, SCORES, name="scores")
        check_int(self.K_max, name="K_max", low=1)

    @property
    def steps(self) -> tuple[int, ...]:
        """The sampled steps (:func:`dipguard.decision.sampled_steps`)."""
        return sampled_steps(self.T, decisions=self.decisions, every=self.every)

    @property
    def images_kept(self) -> int:
        """How many images a fit keeps in memory for each image, about."""
        # The last samples, and about twice as many crossings of two images each, since a replay may take another tau.
        return 5 * self.K_max


@dataclass(frozen=True, kw_only=True)
class StitchOptions:
    """How a trace becomes an image (section 4.1), and open choices of the paper; errors are those of `FitOptions`.

    Attributes:
        tau: Quality threshold, in [0, 1].
        t0: Warm-up, at least 0.
        K: Number of on-boundary images, at least 1.
        beta: Step size of Eq. 6, at least 0.
        rule: ``at_least`` (>=, Algorithm 1) or ``above`` (>, Eq. 3), for tau and t0.
        t0_unit: What t0 counts, ``steps`` or ``samples``.
        divide_by: What Eq. 7 divides by with fewer than K crossings, ``found`` or ``K``.
    """

    tau: float
    t0: int
    K: int
    beta: float
    rule: str = "at_least"
    t0_unit: str = "steps"
    divide_by: str = "found"

    def __post_init__(self) -> None:
        check_thresholds(tau=self.tau, t0=self.t0, rule=self.rule)
        check_int(self.K, name="K", low=1)
        check_float(self.beta, name="beta", low=0.0)
        check_choice(self.t0_unit, T0_UNITS, name="t0_unit")
        check_choice(self.divide_by, DIVISORS, name="divide_by")


def trace_settings(fit: FitOptions, decide: DecideOptions, stitch: StitchOptions | None = None) -> dict[str, Any]:
    """The ``settings`` of a trace: all options as JSON values."""
    return {**fit.as_settings(), **asdict(decide), **({} if stitch is None else asdict(stitch))}
