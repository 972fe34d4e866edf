"""Our own defence: deep image priors near the given image, whose mirrored copies say which classes are likely.

Shifted copies of the given image say which classes a perturbation hides.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dipguard.checks import check_bool, check_float, check_int
from dipguard.classifier import eval_mode, logits_of
from dipguard.decision import DecisionTrace, Reconstruction
from dipguard.decision.class_scores import class_scores, mirrored, shifted, stitch_mirrored
from dipguard.decision.intermediates import STITCHED, Intermediate
from dipguard.decision.quality import image_noise
from dipguard.defenses.base import Purified
from dipguard.defenses.dip import DIPDefense
from dipguard.fit import WindowLogger, run_fit
from dipguard.networks import NetworkSpec
from dipguard.networks.presets import hourglass
from dipguard.registry import check_options
from dipguard.seeding import image_generator

PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": dict(networks=("medium",) * 3, T=170, t0=50, every=20, optimise_z=False),
    "imagenet": dict(networks=(hourglass((16, 32, 64, 64, 64), skips=4, input_depth=3),), T=250, t0=100, every=25,
                     optimise_z=True),
}  # fmt: skip
"""Networks and steps for images of 32x32 and of 224x224 pixels, chosen on tuning images (docs/trials.md)."""
MOST_MIRRORED = 8
"""Most windows of the intermediate `class_scores`: each costs an attack a call of the victim and a gradient."""
GIVEN_READINGS = 1 + 4
"""Of the given image and of its shifted copies."""


class MirrorGuard(DIPDefense):
    """The mean of the reconstructions that the victim assigns to the class with the highest score.

    Like the defence of Ding et al. 2021, it fits untrained networks to the given image alone and lets the victim's
    decisions along the fit choose what is averaged (Eq. 7). It differs in three ways:

    1. Small images are fitted by several networks, each from weights of its own (``networks``).
    2. The noise of the given image says how large a perturbation may be. Errors of a pixel up to 2.5 times the noise
       cost nothing (``dead_zone`` of :class:`~dipguard.fit.FitOptions`), and means of x(t) are clipped to within 6
       times the noise of the given image (``clip``). So early steps, when x(t) has little of the perturbation, can be
       used: the edges that they lack come from the given image.
    3. The class is chosen on mirrored, shifted copies of x(t) by :func:`~dipguard.decision.class_scores.class_scores`.
       It is likely on these copies, and more likely on shifted copies of the given image than on the image itself
       (``beta``), where an attack must have made the true class unlikely.

    If the victim assigns no x(t) itself to this class, the mean is that of all of them. If it assigns the mean to
    another class, the mean is moved along the victim's gradient until the class has a probability above 0.9, mostly by
    at most 2 levels of 255, and never by more than 8. If the victim has no gradient, the mean stays as it is.

    Purifiers have fallen to adaptive attacks (Athalye et al. 2018; Tramer et al. 2020; Croce et al. 2022), and this one
    is broken by attackers who know it, even by those who differentiate the bare victim alone: an image on which a wrong
    class was made very unlikely is assigned to that class. docs/limits.md says how far it was tested.

    A decision trace holds the clipped means of x(t) over windows of all networks' fits, one network after the other, as
    ``samples``, the victim's logits on them and on their mirrored copies, each network's last window as ``last``, and
    no crossings.

    Args:
        preset: What the options that are None take: ``cifar10`` (small images) or ``imagenet`` (photographs). None
            goes by the victim's ``size``: photographs from 96 pixels on, ``cifar10`` if it is not known.
        networks: Networks that are fitted to each image, one after the other: names of presets of appendix B, or specs.
        T: Optimiser steps of each network, at least 2.
        t0: Warm-up: the first step that counts, from 0 to T - 1.
        every: Steps of a window, from 1 to T - t0; the last one ends at T or before.
        beta: Weight, at least 0, of how much more likely a class is on shifted copies of the given image than on the
            image itself, in log-probabilities. 0 leaves this comparison out.
        clip: Largest difference of a window's mean from the given image, in standard deviations of the image's noise
            (:func:`~dipguard.decision.quality.image_noise`), at least 0. 0 does not clip. An image in which no noise is
            found, such as a drawing on a flat ground, is changed by the last step alone.
        mirror: Mirror the copies. False only moves them, for images that mean something else in a mirror (digits, text,
            traffic signs).
        seed, votes, stack_size, progress, trainer, fit: Those of :class:`~dipguard.defenses.dip.DIPDefense`. There is
            no ``network``.
    """

    name: ClassVar[str] = "mirror"
    OPTIONS: ClassVar[tuple[str, ...]] = ("preset", "T", "t0", "every", "beta", "clip", "mirror")
    FIT: ClassVar[dict[str, Any]] = {"dead_zone": 2.5, "optimise_z": None}
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    def __init__(
        self,
        victim: nn.Module,
        *,
        preset: str | None = None,
        networks: Sequence[str | NetworkSpec] | None = None,
        T: int | None = None,
        t0: int | None = None,
        every: int | None = None,
        beta: float = 1.5,
        clip: float = 6.0,
        mirror: bool = True,
        seed: int | None = 0,
        votes: int = 1,
        stack_size: int | None = None,
        progress: bool = True,
        trainer: Mapping[str, Any] | None = None,
        **fit: Any,
    ) -> None:
        if "network" in fit:
            check_options(type(self), fit, owner=f"the defence {self.name!r}")
        given: dict[str, Any] = {"networks": networks, "T": T, "t0": t0, "every": every}
        given["optimise_z"] = fit.get("optimise_z")
        values = self.from_preset(preset, given, victim=victim)
        chosen = values["networks"]
        if isinstance(chosen, str) or not isinstance(chosen, Sequence) or not chosen:
            raise ValueError(f"`networks` must list at least one network, got {networks!r}")
        own: dict[str, Any] = {"votes": votes, "stack_size": stack_size, "progress": progress, "trainer": trainer}
        fit["optimise_z"] = values["optimise_z"]
        super().__init__(victim, network=chosen[0], seed=seed, **own, **fit)
        self.dip_fits = tuple(
            replace(self.fit_options, network=network, seed=_seed_of(self.seed, number))
            for number, network in enumerate(chosen)
        )
        self.T = check_int(values["T"], name="T", low=2)
        self.t0 = check_int(values["t0"], name="t0", low=0, high=self.T - 1)
        self.every = check_int(values["every"], name="every", low=1, high=self.T - self.t0)
        self.beta = check_float(beta, name="beta", low=0.0)
        self.clip = check_float(clip, name="clip", low=0.0)
        self.mirror = check_bool(mirror, name="mirror")
        self.windows = (self.T - self.t0) // self.every
        self.steps = self.t0 + self.windows * self.every  # of one fit: T, or the end of the last whole window

    @property
    def steps_per_purification(self) -> int:
        """The steps of all networks."""
        return self.steps * len(self.dip_fits)

    @property
    def images_kept(self) -> int:
        """The windows of all networks."""
        return self.windows * len(self.dip_fits)

    @property
    def intermediate_views(self) -> dict[str, int]:
        """Each network's last window, the mean of all, what the class scores are made of, and the stitched image.

        The scores that an attack sees are those of up to eight windows and of the given image with its four copies.
        """
        return {"last": len(self.dip_fits), "mean": 1, "class_scores": len(self._shown()) + GIVEN_READINGS, STITCHED: 1}

    def rebuild(self, trace: DecisionTrace) -> Reconstruction:
        """Stitch an image again from its trace, with the same victim: it reads shifted copies of the given image, too.

        ValueError for a trace with other windows (T, t0, every, number of networks) or another ``clip`` or ``mirror``.
        """
        if trace.steps.tolist() != (steps := self._steps().tolist()):
            got = f"{len(trace.steps)} windows, the last one to step {int(trace.steps[-1])}"
            raise ValueError(
                f"`trace` must have the windows of this defence, {len(steps)} to step {steps[-1]}, got {got}"
            )
        for name in ("clip", "mirror"):
            ours, others = getattr(self, name), trace.settings.get(name)
            if others != ours:
                raise ValueError(f"`trace` must be of a defence with {name}={ours}, got {name}={others}")
        return self._rebuild([trace])[0]

    def _rebuild(self, traces: Sequence[DecisionTrace]) -> list[Reconstruction]:
        """Stitch the images of a stack."""
        return stitch_mirrored(traces, beta=self.beta, decider=self.decide)

    def _steps(self) -> Tensor:
        """Each window's last step, where its mean stands; a network's steps follow those of the one before, [S]."""
        ends = self.t0 + self.every * torch.arange(1, self.windows + 1, device="cpu") - 1
        return torch.cat([number * self.steps + ends for number in range(len(self.dip_fits))])

    def _purify_stack(self, images: Tensor, indices: list[int], run: dict[str, Any], *, first_step: int) -> Purified:
        """Fit all networks to one stack, and stitch the windows of the winning class."""
        own = self.decide(images).to(run["device"])  # a bad victim is noticed before the fit
        windows: Any = {"warm_up": self.t0, "every": self.every, "windows": self.windows, "flip": self.mirror}
        windows["distances"] = self.clip * image_noise(images.to(run["device"])) if self.clip > 0 else None
        seconds, logs = {"start": 0.0, "fit": 0.0}, []
        for number, fit in enumerate(self.dip_fits):
            at = first_step + number * self.steps
            log = WindowLogger(self.victim, **windows, given_logits=own, first_step=at)
            own_run = run | {"callbacks": [log, *run["callbacks"]]}
            spent = run_fit(images, T=self.steps, indices=indices, fit=fit, **own_run)
            seconds = {part: seconds[part] + spent[part] for part in seconds}
            logs.append(log)
        asked, fitted = sum(log.seconds for log in logs), time.perf_counter()
        traces = self._traces(logs, images, indices, own.cpu())
        rebuilt = self._rebuild(traces)
        seconds["fit"] -= asked
        seconds["decide"] = time.perf_counter() - fitted + asked
        return Purified.stitched(rebuilt, like=images, traces=traces, seconds=seconds)

    def _traces(
        self, logs: Sequence[WindowLogger], images: Tensor, indices: list[int], own: Tensor
    ) -> list[DecisionTrace]:
        """One decision trace per image of a stack [B, 3, H, W] with the victim's logits ``own`` [B, C]; on the CPU."""
        parts = dict(
            samples="samples", scores="logits", mirrored_logits="mirrored_logits", loss="errors", quality="quality"
        )
        made = {name: torch.cat([getattr(log, part) for log in logs]).cpu() for name, part in parts.items()}
        made["last"] = made["samples"][self.windows - 1 :: self.windows]
        none = torch.empty(0, dtype=made["samples"].dtype, device="cpu")
        given = images.to(made["samples"])
        return [
            DecisionTrace(
                index=index,
                given=given[i].clone(),  # a view would keep the whole batch
                given_scores=own[i].clone(),
                steps=self._steps(),
                crossing_at=none.long(),
                alpha=none,
                on_boundary=none.new_empty(0, *images.shape[1:]),
                settings=self.settings,
                **{name: tensor[:, i].contiguous() for name, tensor in made.items()},
            )
            for i, index in enumerate(indices)
        ]

    def _shown(self) -> Tensor:
        """Which windows the scores that an attack sees are made of, spread from first to last."""
        last, count = self.images_kept - 1, min(MOST_MIRRORED, self.images_kept)
        return torch.linspace(0, last, count, device="cpu").round().long()

    def _intermediates(self, images: Tensor, indices: list[int]) -> dict[str, Intermediate]:
        """Fit once; ``class_scores`` are windows, with the scores that choose the class."""
        made = self._purify(images, indices, callbacks=(), logger=None)
        samples = torch.stack([trace.samples for trace in made.traces if trace.samples is not None], dim=1)
        return {
            "last": Intermediate(samples[self.windows - 1 :: self.windows].to(images, copy=True)),
            "mean": Intermediate(samples.mean(dim=0, keepdim=True).to(images)),
            "class_scores": Intermediate(samples[self._shown()].to(images), self._scores, GIVEN_READINGS),
            STITCHED: Intermediate(made.reconstructions[None]),
        }

    def _scores(self, windows: Tensor, images: Tensor) -> Tensor:
        """The class scores [B, C] of images [B, 3, H, W] with windows [V, B, 3, H, W]; differentiable."""
        with eval_mode(self.victim):
            copies = logits_of(self.victim, mirrored(windows.flatten(0, 1), flip=self.mirror))
            given = logits_of(self.victim, torch.cat([images[None], shifted(images)]).flatten(0, 1))
        own, *elsewhere = given.unflatten(0, (GIVEN_READINGS, len(images)))
        return class_scores(copies.unflatten(0, windows.shape[:2]), own, torch.stack(elsewhere), beta=self.beta)


def _seed_of(seed: int, number: int) -> int:
    """The seed of one of a guard's networks: that of the guard for the first, unrelated ones for the others."""
    if number == 0:
        return seed
    generator = image_generator(seed=seed, index=number, purpose="network")
    return int(torch.randint(2**31, (1,), generator=generator, device="cpu"))
