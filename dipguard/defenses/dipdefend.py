"""DIPDefend (Dai et al. 2020): its stopping rule on another fit, and the whole of it as its authors ran it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import nn

from dipguard.checks import check_choice, check_float, check_int
from dipguard.decision.stopping import TILE, PeakOfSmoothedPSNR
from dipguard.defenses.stopped_dip import StoppedDIP
from dipguard.fit import FitOptions
from dipguard.networks.presets import hourglass
from dipguard.store import TraceStore


class Preset(NamedTuple):
    """A configuration of the authors: fit and number of steps."""

    fit: dict[str, Any]
    T: int


PRESETS: dict[str, Preset] = {
    "cifar10": Preset(
        {
            "network": hourglass((4, 8, 16), skips=0, input_depth=1),
            "padding": "zeros",
            "jitter": 0.0,
            "optimise_z": True,
        },
        T=4000,
    ),
    "imagenet": Preset(
        {
            "network": hourglass((16, 32, 64, 128, 128), skips=4, input_depth=3, upsample="nearest"),
            "padding": "reflect",
            "jitter": 1 / 30,
            "optimise_z": True,
        },
        T=2400,
    ),
}
"""The authors' configurations, as far as ports of their script tell; what is not named here is FitOptions' default."""


class SmoothedPSNRDIP(StoppedDIP):
    """DIPDefend's stopping rule (Dai et al. 2020) on the official DIP code's fit for denoising.

    What Ding et al. 2021 change against DIPDefend is fit and rule both; this row changes the rule alone.
    The rule's trend starts from the rise of the first step, which jitter blurs: of 16 tuning CIFAR-10 images, most had
    their peak between steps 620 and 870, and two to four had none before T = 1000 (then the last step is taken).

    Args:
        victim: As in `StoppedDIP`.
        smoothing: Of the PSNR curve, in [0, 1]; the authors' value is the default.
        tile: Side of the tiles whose smallest PSNR is taken, pixels.
        fit: As in `StoppedDIP`.
        T: As in `StoppedDIP`.
        seed: As in `StoppedDIP`.
        stack_size: As in `StoppedDIP`.
        progress: As in `StoppedDIP`.
        store: As in `StoppedDIP`.
    """

    name: ClassVar[str] = "dipdefend_rule"

    def __init__(
        self,
        victim: nn.Module,
        *,
        smoothing: float = 0.002,
        tile: int = TILE,
        fit: Mapping[str, Any] | FitOptions | None = None,
        T: int = 1000,
        seed: int = 0,
        stack_size: int | None = None,
        progress: bool = True,
        store: str | Path | TraceStore | None = None,
    ) -> None:
        super().__init__(victim, fit=fit, T=T, seed=seed, stack_size=stack_size, progress=progress, store=store)
        self.smoothing = check_float(smoothing, name="smoothing", low=0.0, high=1.0)
        self.tile = check_int(tile, name="tile", low=1)

    @property
    def rule_settings(self) -> dict[str, Any]:
        """Smoothing and tile."""
        return {"smoothing": self.smoothing, "tile": self.tile}

    def make_rule(self) -> PeakOfSmoothedPSNR:
        """See `dipguard.decision.stopping.PeakOfSmoothedPSNR`."""
        return PeakOfSmoothedPSNR(smoothing=self.smoothing, tile=self.tile)


class DIPDefend(SmoothedPSNRDIP):
    """DIPDefend (Dai et al. 2020, "DIPDefend: Deep Image Prior Driven Defense against Adversarial Examples").

    A small untrained network is fitted to the image, network and z together (Adam, 0.01, mean squared error); the
    result is the reconstruction at the peak of a smoothed PSNR curve (`PeakOfSmoothedPSNR`).

    No official code is public; the presets follow ports of the authors' script. ``cifar10``: z of 1 channel, U(0, 0.1),
    channels 4-8-16, no skips, bilinear, zero padding (9,011 parameters), 4,000 steps, most peaks near 650.
    ``imagenet``: z of 3 channels, 16-32-64-128-128, skips of 4, nearest, reflected borders, jitter 1/30, 2,400 steps.
    Two points of ``imagenet`` are open: the ports end that network without a sigmoid, where ours always has one; and
    with jitter on they feed a copy of z, so that the z that Adam holds never moves, which is
    ``fit={"optimise_z": False}`` here.

    No paper is known to us that breaks it by name. Ding et al. 2021 show it losing to identity BPDA (their Figure 4)
    and to examples near the decision boundary (C&W); purifiers with no more evidence than this one have fallen to
    adaptive attacks (Athalye et al. 2018; Tramer et al. 2020; Croce et al. 2022).

    Args:
        victim: As in `StoppedDIP`.
        preset: ``cifar10`` or ``imagenet``, the two configurations of the authors (`PRESETS`).
        T: Optimiser steps; None takes the preset's (4000, 2400).
        smoothing: Of the PSNR curve, in [0, 1].
        tile: Side of the tiles whose smallest PSNR is taken, pixels.
        fit: Fields of :class:`~dipguard.fit.FitOptions` that shall differ from the preset's, such as the engine.
        seed: As in `StoppedDIP`.
        stack_size: As in `StoppedDIP`.
        progress: As in `StoppedDIP`.
        store: As in `StoppedDIP`.

    Raises:
        TypeError, ValueError: An option is out of range.
    """

    name: ClassVar[str] = "dipdefend"

    def __init__(
        self,
        victim: nn.Module,
        *,
        preset: str = "cifar10",
        T: int | None = None,
        smoothing: float = 0.002,
        tile: int = TILE,
        fit: Mapping[str, Any] | None = None,
        seed: int = 0,
        stack_size: int | None = None,
        progress: bool = True,
        store: str | Path | TraceStore | None = None,
    ) -> None:
        self.preset = check_choice(preset, PRESETS, name="preset")
        own = PRESETS[preset]
        super().__init__(
            victim,
            smoothing=smoothing,
            tile=tile,
            fit={**own.fit, **(fit or {})},
            T=own.T if T is None else T,
            seed=seed,
            stack_size=stack_size,
            progress=progress,
            store=store,
        )

    @property
    def rule_settings(self) -> dict[str, Any]:
        """The preset's name, smoothing and tile."""
        return {"preset": self.preset, **super().rule_settings}
