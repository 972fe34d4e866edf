"""Our own defence: two small deep image priors, read straight and in the mirror."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from dipguard.checks import check_float, check_int
from dipguard.decision.evidence import SHIFTS, Stitched, stitch_readings
from dipguard.decision.readout import STITCHED, Readout
from dipguard.defenses.base import Purifier
from dipguard.defenses.mirror_readouts import Readings, mirror_readouts, mirrored_views
from dipguard.defenses.stopped_fit import fit_options, stack_size_of
from dipguard.fit import Decider, FitOptions, FitProgress, StackedDIP, in_stacks
from dipguard.fit.evidence_logger import EvidenceLogger
from dipguard.fit.placement import fit_device
from dipguard.fit.runner import apart, make_trainer
from dipguard.networks import NetworkSpec, resolve
from dipguard.networks.presets import hourglass

NETWORKS = (hourglass((4, 8, 16), skips=0, input_depth=1), hourglass((8, 16, 32), skips=0, input_depth=1))
"""The network of DIPDefend (9,011 parameters), which strong perturbations survive least, and one twice as wide, which
keeps more of a clean image."""


Kept = TypeVar("Kept")


class MirrorGuard(Purifier):
    """The mean of the reconstructions that the victim reads as what their mirrored copies most speak for.

    It keeps the frame of Ding et al. 2021: an untrained network is fitted to the given image alone, the victim's
    decisions along the fit choose what is averaged (Eq. 7), and a step away from the given image (Eq. 6) is taken where
    the mean is not read as it should be. What differs: two networks without skip connections (z fitted with them, no
    jitter, zero padding), and the class is not that of the last crossings but the one with the most evidence in
    mirrored copies of x(t) that were moved by two pixels, the given image's own class counting half.

    How it was chosen, and its figures: docs/trials.md. An attacker who knows it can attack the mirrored reading too: a
    mirror hides nothing. Purifiers have fallen to adaptive attacks (Athalye et al. 2018; Tramer et al. 2020; Croce et
    al. 2022); docs/limits.md says how far this one was tried.

    Args:
        victim: As in `Purifier`; it guides the reconstruction.
        networks: Fitted one after the other, each to every image; a preset's name or a spec.
        T: Optimiser steps of each.
        t0: Warm-up: first step that is looked at, below T.
        every: Steps of a window; the last one ends at T or before.
        trust: Weight, in [0, 1], of the class that the victim reads in the given image; 1 treats it like all others.
        mirror: Mirror the copies that the evidence is read from. False only moves them, for images that mean something
            else in a mirror (digits, text, traffic signs).
        beta: Longest step away from the given image, in units of Eq. 6.
        beta_step: Distance of the steps tried up to ``beta``.
        fit: Fields of :class:`~dipguard.fit.FitOptions` that shall differ: z is fitted too, no jitter, zero padding.
        seed: Of weights and z.
        stack_size: Images fitted at once; None chooses by free memory and speed.
        progress: Show a progress bar.

    Raises:
        TypeError, ValueError: An option is out of range.
    """

    name: ClassVar[str] = "dipguard"

    def __init__(
        self,
        victim: nn.Module,
        *,
        networks: Sequence[str | NetworkSpec] = NETWORKS,
        T: int = 1000,
        t0: int = 300,
        every: int = 25,
        trust: float = 0.5,
        mirror: bool = True,
        beta: float = 0.5,
        beta_step: float = 0.05,
        fit: Mapping[str, Any] | FitOptions | None = None,
        seed: int = 0,
        stack_size: int | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(victim, seed=seed)
        if isinstance(networks, str) or not networks:
            raise ValueError(f"`networks` must list at least one network, got {networks!r}")
        self.T = check_int(T, name="T", low=2)
        self.t0 = check_int(t0, name="t0", low=0, high=self.T - 1)
        self.every = check_int(every, name="every", low=1, high=self.T - self.t0)
        self.trust = check_float(trust, name="trust", low=0.0, high=1.0)
        self.mirror = bool(mirror)
        self.beta = check_float(beta, name="beta", low=0.0)
        self.beta_step = check_float(beta_step, name="beta_step", low=1e-3)
        own: dict[str, Any] = {"padding": "zeros", "jitter": 0.0, "optimise_z": True}
        if isinstance(fit, Mapping) and "network" in fit:
            raise ValueError(f"`fit` must leave the networks to `networks`, got network={fit['network']!r}")
        base = fit_options(fit if isinstance(fit, FitOptions) else {**own, **(fit or {})}, seed=self.seed)
        self.fits = [replace(base, network=resolve(network)) for network in networks]
        self.stack_size = None if stack_size is None else check_int(stack_size, name="stack_size", low=1)
        self.progress = progress

    @property
    def random(self) -> bool:
        """Weights and z are drawn."""
        return True

    @property
    def dip_fits(self) -> tuple[FitOptions, ...]:
        """One a network."""
        return tuple(self.fits)

    @property
    def readout_views(self) -> dict[str, int]:
        """See :func:`~dipguard.defenses.mirror_readouts.mirror_readouts`."""
        count = len(self.fits)
        return {"last": count, "mean": 1, "mirrored": len(mirrored_views(self.windows * count)), STITCHED: 1}

    @property
    def windows(self) -> int:
        """Windows of one fit."""
        return (self.T - self.t0) // self.every

    @property
    def steps(self) -> int:
        """Optimiser steps of one fit: T, or fewer where a window would be cut."""
        return self.t0 + self.windows * self.every

    @property
    def betas(self) -> list[float]:
        """Steps away from the given image that are tried, in order."""
        return [round(self.beta_step * i, 6) for i in range(1, int(self.beta / self.beta_step + 1e-6) + 1)]

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Purifier`, with the fits' options and everything that reads them."""
        fits = [{k: v for k, v in fit.as_settings().items() if k != "seed"} for fit in self.fits]
        own = {
            "T": self.T,
            "t0": self.t0,
            "every": self.every,
            "trust": self.trust,
            "mirror": self.mirror,
            "beta": self.beta,
            "beta_step": self.beta_step,
        }
        return {**super().settings, "fit": fits, **own, "shifts": [list(shift) for shift in SHIFTS]}

    @property
    def steps_per_image(self) -> int:
        """Those of all networks; a fit ends with its last whole window."""
        return self.steps * len(self.fits)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """The images' own size.

        Raises:
            ValueError: The image is too small for a network.
        """
        for fit in self.fits:
            resolve(fit.network).check_size(height, width)
        return height, width

    def read(self, images: Tensor, indices: list[int], *, progress: FitProgress | None = None) -> Readings:
        """Fit all networks to checked images [B, 3, H, W] and show the victim what comes of it."""
        device = fit_device("auto", victim=self.victim, images=images)
        logs = []
        for fit in self.fits:
            log = EvidenceLogger(self.victim, warm_up=self.t0, every=self.every, windows=self.windows, flip=self.mirror)
            with apart(device):
                module = StackedDIP(images, indices=indices, options=fit)
                callbacks = [log] if progress is None else [log, progress]
                make_trainer(self.steps, device=device, callbacks=[*callbacks], logger=None).fit(module)
            logs.append(log)
        samples, straight, turned, errors = (
            torch.cat([getattr(log, name) for log in logs]) for name in ("samples", "straight", "turned", "errors")
        )
        own = Decider(self.victim)(images)
        return Readings(samples, straight, turned, errors, own, sum(log.seconds for log in logs))

    def stitch(self, readings: Readings, images: Tensor) -> list[Stitched]:
        """The purified images, and how they came about, one an image."""
        decide = Decider(self.victim)
        own: list[int] = readings.own.argmax(dim=-1).tolist()
        return [
            stitch_readings(
                readings.samples[:, i],
                readings.straight[:, i],
                readings.turned[:, i],
                image.to(readings.samples),
                own=own[i],
                trust=self.trust,
                classify=decide,
                betas=self.betas,
            )
            for i, image in enumerate(images)
        ]

    def purify_images(self, images: Tensor, indices: list[int]) -> Tensor:
        """Fit and stitch, stack by stack."""
        return torch.cat(list(self._each_stack(images, indices, lambda _, stitched: stitched))).to(images)

    def readouts_of(self, images: Tensor, indices: list[int]) -> dict[str, Readout]:
        """Fit and stitch, stack by stack, and keep a handful of what was looked at."""

        def kept(readings: Readings, stitched: Tensor) -> dict[str, Readout]:
            return mirror_readouts(readings.samples, stitched, networks=len(self.fits), flip=self.mirror, like=images)

        parts = list(self._each_stack(images, indices, kept))
        return {name: Readout.join([part[name] for part in parts]) for name in parts[0]}

    def _each_stack(
        self, images: Tensor, indices: list[int], keep: Callable[[Readings, Tensor], Kept]
    ) -> Iterator[Kept]:
        device = fit_device("auto", victim=self.victim, images=images)

        def work(part: slice, first_step: int, progress: FitProgress) -> Kept:
            readings = self.read(images[part], indices[part], progress=progress)
            return keep(readings, torch.stack([made.image for made in self.stitch(readings, images[part])]))

        size, T, show = self.choose_stack_size(images), self.steps_per_image, self.progress
        return in_stacks(len(images), size=size, T=T, work=work, device=device, progress=show)

    def choose_stack_size(self, images: Tensor) -> int:
        """How many of ``images`` are fitted at once: ``stack_size``, or what suits the largest network."""
        if self.stack_size is not None:
            return self.stack_size
        return stack_size_of(images, victim=self.victim, fits=self.fits, T=self.T, kept=self.windows * len(self.fits))

    def purify_one(self, image: Tensor, index: int) -> Tensor:
        """A stack of one."""
        return self.purify_images(image[None], [index])[0]
