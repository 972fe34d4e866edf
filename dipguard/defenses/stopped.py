"""Deep image priors that a rule stops at some step; the victim is not asked during the fit."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from dipguard.checks import check_float, check_int
from dipguard.decision.stopping import FixedStep, PeakOfSmoothedPSNR, StopRule, WindowedVariance
from dipguard.defenses.base import Purified
from dipguard.defenses.dip import DIPDefense, StackRun
from dipguard.fit import fit_rule
from dipguard.networks import NetworkSpec
from dipguard.networks.presets import hourglass


class StoppedDIP(DIPDefense):
    """A fit of a deep image prior, and a rule that chooses one reconstruction of each image.

    A subclass sets ``name`` and ``OPTIONS`` and implements `make_rule`. By default the fit is that of the official DIP
    code for denoising: slow and smooth, so that a rule can find the turning point. DIPGuard's own fit, without noise on
    z, is past it after some 100 steps (docs/readings.md). A fit ends before ``T`` steps, at least 1, once the rule has
    chosen for all images of a stack.
    """

    FIT: ClassVar[dict[str, Any]] = {"jitter": 0.03333333333333333, "padding": "reflect"}

    def __init__(self, victim: nn.Module, *, T: int = 1000, **options: Any) -> None:
        super().__init__(victim, **options)
        self.T = check_int(T, name="T", low=1)

    @abstractmethod
    def make_rule(self) -> StopRule:
        """Return a fresh rule, for one stack and one fit."""

    @property
    def images_kept(self) -> int:
        """The reconstructions that the rule holds at once."""
        return 1

    @property
    def settings(self) -> dict[str, Any]:
        """The options of fit and rule."""
        return {**super().settings, "T": self.T}

    @property
    def steps_per_image(self) -> int:
        """The steps that the rule has to see."""
        return self.make_rule().steps_needed(self.T)

    def _purify_stack(self, images: Tensor, indices: list[int], run: StackRun, *, first_step: int) -> Purified:
        """Fit one stack until the rule has chosen."""
        start = time.perf_counter()
        stopped = fit_rule(images, rule=self.make_rule(), indices=indices, fit=self.fit_options, T=self.T, **run)
        return Purified.plain(stopped.images.to(images), start=start)


class FixedStepDIP(StoppedDIP):
    """DIP stopped at ``step``, below T (Kattamis et al. 2019; Sutanto and Lee 2020), like for denoising.

    500 is half of the T of Ding et al. 2021 on CIFAR-10 and was not tuned. Later steps favour clean images and cost
    more; no step is right for clean and attacked images alike. It falls to attacks that differentiate through the fit,
    or step over it (BPDA, Athalye et al. 2018).
    """

    name: ClassVar[str] = "dip_fixed"
    OPTIONS: ClassVar[tuple[str, ...]] = ("step",)

    def __init__(self, victim: nn.Module, *, step: int = 500, **options: Any) -> None:
        super().__init__(victim, **options)
        self.step = check_int(step, name="step", low=0, high=self.T - 1)

    def make_rule(self) -> FixedStep:
        """See `dipguard.decision.stopping.FixedStep`."""
        return FixedStep(self.step)


class WindowedVarianceDIP(StoppedDIP):
    """ES-WMV (Wang et al. 2023): stopped where a window of reconstructions varies least.

    Its authors restore images; we know of no claim that it is a defence. With their window and patience, and T = 1000,
    the variance of this fit falls nearly to the end.

    Args:
        window: Reconstructions W of a window, from 2 to T.
        patience: Windows P without a smaller variance after which an image stops, at least 1; with P of T or more, the
            rule looks at the whole fit.
    """

    name: ClassVar[str] = "dip_es_wmv"
    OPTIONS: ClassVar[tuple[str, ...]] = ("window", "patience")

    def __init__(self, victim: nn.Module, *, window: int = 100, patience: int = 1000, **options: Any) -> None:
        super().__init__(victim, **options)
        self.window = check_int(window, name="window", low=2, high=self.T)
        self.patience = check_int(patience, name="patience", low=1)

    @property
    def images_kept(self) -> int:
        """The window's, the choice, and a sum of twice the precision."""
        return self.window + 3

    def make_rule(self) -> WindowedVariance:
        """See `dipguard.decision.stopping.WindowedVariance`."""
        return WindowedVariance(window=self.window, patience=self.patience)


class SmoothedPSNRDIP(StoppedDIP):
    """DIPDefend's stopping rule (Dai et al. 2020) on the official DIP code's fit for denoising.

    The rule's trend starts from the rise of the first step, which jitter blurs; without a peak before T the last step
    is taken.

    ``smoothing``, in [0, 1], is that of the PSNR curve; ``tile`` the side in pixels of the tiles whose smallest PSNR is
    taken.
    """

    name: ClassVar[str] = "dipdefend_rule"
    OPTIONS: ClassVar[tuple[str, ...]] = ("smoothing", "tile")

    def __init__(self, victim: nn.Module, *, smoothing: float = 0.002, tile: int = 32, **options: Any) -> None:
        super().__init__(victim, **options)
        self.smoothing = check_float(smoothing, name="smoothing", low=0.0, high=1.0)
        self.tile = check_int(tile, name="tile", low=1)

    def make_rule(self) -> PeakOfSmoothedPSNR:
        """See `dipguard.decision.stopping.PeakOfSmoothedPSNR`."""
        return PeakOfSmoothedPSNR(smoothing=self.smoothing, tile=self.tile)


_SMALL = hourglass((4, 8, 16), skips=0, input_depth=1)
_LARGE = hourglass((16, 32, 64, 128, 128), skips=4, input_depth=3, upsample="nearest")
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": dict(network=_SMALL, T=4000, padding="zeros", jitter=0.0, optimise_z=True),
    "imagenet": dict(network=_LARGE, T=2400, padding="reflect", jitter=1 / 30, optimise_z=True),
}
"""The authors' configurations; the rest is FitOptions' default."""


class DIPDefend(SmoothedPSNRDIP):
    """DIPDefend (Dai et al. 2020, "DIPDefend: Deep Image Prior Driven Defense against Adversarial Examples").

    A small untrained network is fitted to the image, network and z together (Adam, 0.01, mean squared error); the
    result is the reconstruction at the peak of a smoothed PSNR curve (`PeakOfSmoothedPSNR`), on CIFAR-10 mostly near
    step 650. Options that are None take the value of the ``preset``, ``cifar10`` or ``imagenet``; without one, the
    victim's ``size`` chooses.

    No official code is public; `PRESETS` follow ports of the authors' script. Two points of ``imagenet`` are open: the
    ports end that network without a sigmoid, where ours always has one; and with jitter on they feed a copy of z, so
    that the z that Adam holds never moves, which is ``optimise_z=False`` here.

    No paper is known to us that breaks it by name. Ding et al. 2021 show it losing to identity BPDA (their Figure 4)
    and to examples near the decision boundary (C&W); purifiers with no more evidence than this one have fallen to
    adaptive attacks (Athalye et al. 2018; Tramer et al. 2020; Croce et al. 2022).
    """

    name: ClassVar[str] = "dipdefend"
    OPTIONS: ClassVar[tuple[str, ...]] = ("preset", "smoothing", "tile")
    FIT: ClassVar[dict[str, Any]] = {"jitter": None, "padding": None, "optimise_z": None}
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    def __init__(
        self,
        victim: nn.Module,
        *,
        preset: str | None = None,
        network: str | NetworkSpec | None = None,
        T: int | None = None,
        **options: Any,
    ) -> None:
        given = {"network": network, "T": T, **options}
        super().__init__(victim, **self.from_preset(preset, given, victim=victim))
