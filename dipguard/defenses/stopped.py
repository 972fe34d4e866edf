"""Deep image priors that a rule stops at some step; the victim is not asked during the fit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from dipguard.checks import check_float, check_int
from dipguard.decision.stopping import FixedStep, PeakOfSmoothedPSNR, StopRule
from dipguard.defenses.base import Purified
from dipguard.defenses.dip import DIPDefense
from dipguard.fit import StopRuleCallback, run_fit
from dipguard.networks import NetworkSpec
from dipguard.networks.presets import hourglass


class StoppedDIP(DIPDefense):
    """A fit of a deep image prior, and a rule that chooses one reconstruction of each image.

    A subclass sets ``name`` and ``OPTIONS`` and implements `make_rule`. ``T``, at least 1, is the largest number of
    steps.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("T",)
    asks_victim: ClassVar[bool] = False

    def __init__(self, victim: nn.Module, *, T: int = 1000, **options: Any) -> None:
        super().__init__(victim, **options)
        self.T = check_int(T, name="T", low=1)

    @abstractmethod
    def make_rule(self) -> StopRule:
        """Return a fresh rule, for one stack and one fit."""

    @property
    def images_kept(self) -> int:
        """The rule's choice."""
        return 1

    @property
    def steps_per_purification(self) -> int:
        """The steps that the rule has to see."""
        return self.make_rule().steps_needed(self.T)

    def _purify_stack(self, images: Tensor, indices: list[int], run: dict[str, Any], *, first_step: int) -> Purified:
        """Fit one stack until the rule has chosen, and no longer."""
        rule = self.make_rule()
        own = run | {"callbacks": [StopRuleCallback(rule, first_step=first_step), *run["callbacks"]]}
        seconds = run_fit(images, T=rule.steps_needed(self.T), indices=indices, fit=self.fit_options, **own)
        return Purified.plain(rule.result().images.to(images), seconds=seconds)


class FixedStepDIP(StoppedDIP):
    """DIP stopped at ``step``, below T (Kattamis et al. 2019; Sutanto and Lee 2020), as for denoising.

    By default noise is added to z at each step, as in the official DIP code for denoising but three times as strong
    relative to z, and borders are reflected: the fit is slow and smooth. DIPGuard's own fit, without noise on z, has
    taken in the attack after some 100 steps (docs/readings.md).

    500 is half of the T of Ding et al. 2021 on CIFAR-10 and was not tuned. Later steps favour clean images and cost
    more; no step is right for clean and attacked images alike. It falls to attacks that differentiate through the fit,
    or step over it (BPDA, Athalye et al. 2018).
    """

    name: ClassVar[str] = "dip_fixed"
    OPTIONS: ClassVar[tuple[str, ...]] = ("step",)  # without T, which changes nothing
    FIT: ClassVar[dict[str, Any]] = {"jitter": 0.03333333333333333, "padding": "reflect"}

    def __init__(self, victim: nn.Module, *, step: int = 500, **options: Any) -> None:
        super().__init__(victim, **options)
        self.step = check_int(step, name="step", low=0, high=self.T - 1)

    def make_rule(self) -> FixedStep:
        """See `dipguard.decision.stopping.FixedStep`."""
        return FixedStep(self.step)


_SMALL = hourglass((4, 8, 16), skips=0, input_depth=1)
_LARGE = hourglass((16, 32, 64, 128, 128), skips=4, input_depth=3, upsample="nearest")
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": dict(network=_SMALL, T=4000, padding="zeros", jitter=0.0, optimise_z=True),
    "imagenet": dict(network=_LARGE, T=2400, padding="reflect", jitter=1 / 30, optimise_z=True),
}
"""The authors' configurations; the rest is FitOptions' default."""


class DIPDefend(StoppedDIP):
    """DIPDefend (Dai et al. 2020, "DIPDefend: Deep Image Prior Driven Defense against Adversarial Examples").

    A small untrained network is fitted to the image, network and z together (Adam, 0.01, mean squared error); the
    result is the reconstruction at the peak of a smoothed PSNR curve (`PeakOfSmoothedPSNR`), on CIFAR-10 mostly near
    step 650. Options that are None take the value of the ``preset``, ``cifar10`` or ``imagenet``; without one, the
    victim's ``size`` chooses. ``smoothing``, in [0, 1], is that of the PSNR curve; ``tile`` the side in pixels of the
    tiles whose smallest PSNR is taken.

    No official code is public; `PRESETS` follow ports of the authors' script. Two points of ``imagenet`` are open: the
    ports end that network without a sigmoid, where ours always has one; and with jitter on they feed a copy of z, so
    that the z that Adam holds never moves, which is ``optimise_z=False`` here.

    No paper is known to us that breaks it by name. Ding et al. 2021 show it losing to identity BPDA (their Figure 4)
    and to examples near the decision boundary (C&W); purifiers with no more evidence than this one have fallen to
    adaptive attacks (Athalye et al. 2018; Tramer et al. 2020; Croce et al. 2022).
    """

    name: ClassVar[str] = "dipdefend"
    OPTIONS: ClassVar[tuple[str, ...]] = ("preset", "T", "smoothing", "tile")
    FIT: ClassVar[dict[str, Any]] = {"jitter": None, "padding": None, "optimise_z": None}
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    def __init__(
        self,
        victim: nn.Module,
        *,
        preset: str | None = None,
        network: str | NetworkSpec | None = None,
        T: int | None = None,
        smoothing: float = 0.002,
        tile: int = 32,
        **options: Any,
    ) -> None:
        given = {"network": network, "T": T, **options}
        super().__init__(victim, **self.from_preset(preset, given, victim=victim))
        self.smoothing = check_float(smoothing, name="smoothing", low=0.0, high=1.0)
        self.tile = check_int(tile, name="tile", low=1)

    def make_rule(self) -> PeakOfSmoothedPSNR:
        """See `dipguard.decision.stopping.PeakOfSmoothedPSNR`."""
        return PeakOfSmoothedPSNR(smoothing=self.smoothing, tile=self.tile)
