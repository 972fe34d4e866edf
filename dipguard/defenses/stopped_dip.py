"""Deep image priors that are stopped at some step, with no victim asked on the way."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dipguard.checks import check_int
from dipguard.decision.stopping import FixedStep, Stopped, StopRule, WindowedVariance
from dipguard.defenses.base import Purifier
from dipguard.defenses.stopped_fit import DENOISING, fit_options, stack_size_of, stop_stack
from dipguard.fit import FitOptions, FitProgress, fit_device, in_stacks
from dipguard.networks import resolve
from dipguard.store import RuleAsked, TraceStore, open_store


class StoppedDIP(Purifier):
    """A stacked DIP fit and a rule that chooses one reconstruction of each image.

    A subclass sets ``name`` and implements `make_rule` and `rule_settings`. Fits of the same ``fit_options`` and ``T``
    have the same x(t): one of them serves any number of these defences, and DIPGuard's serves them too (a
    `dipguard.fit.stop_rules.StopRules` with their rules among its callbacks).

    Args:
        victim: As in `Purifier`; the fit runs where it is, and never asks it.
        fit: :class:`~dipguard.fit.FitOptions`, or those of its fields that differ from its defaults and from
            :data:`~dipguard.defenses.stopped_fit.DENOISING`; its seed comes from ``seed``.
        T: Optimiser steps, at least 1.
        seed: Of weights, z and jitter.
        stack_size: Images fitted at once, fewer once memory has run out; None chooses by free memory and speed. No
            image's result depends on it (in exact arithmetic; but for the native engine, Adam amplifies rounding).
        progress: Show a progress bar.
        store: Folder of fits made earlier (:mod:`dipguard.store`): what the rule chose there is not chosen again.

    Raises:
        TypeError, ValueError: An option is out of range.
    """

    def __init__(
        self,
        victim: nn.Module,
        *,
        fit: Mapping[str, Any] | FitOptions | None = None,
        T: int = 1000,
        seed: int = 0,
        stack_size: int | None = None,
        progress: bool = True,
        store: str | Path | TraceStore | None = None,
    ) -> None:
        super().__init__(victim, seed=seed)
        self.store = open_store(store)
        self.fit_options = fit_options(
            fit if isinstance(fit, FitOptions) else {**DENOISING, **(fit or {})}, seed=self.seed
        )
        self.T = check_int(T, name="T", low=1)
        self.stack_size = None if stack_size is None else check_int(stack_size, name="stack_size", low=1)
        self.progress = progress

    @abstractmethod
    def make_rule(self) -> StopRule:
        """A fresh rule, for one stack and one fit."""

    @property
    @abstractmethod
    def rule_settings(self) -> dict[str, Any]:
        """What the rule depends on, ready for JSON."""

    @property
    def asked(self) -> RuleAsked:
        """The rule, as a store knows it."""
        return RuleAsked(make=self.make_rule, settings=self.rule_settings, T=self.T)

    @property
    def images_kept(self) -> int:
        """Most reconstructions of one image that the rule holds at once."""
        return 1

    @property
    def random(self) -> bool:
        """Weights, z and jitter are drawn."""
        return True

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Purifier`, with the fit's options, T and the rule's settings."""
        fit = {key: value for key, value in self.fit_options.as_settings().items() if key != "seed"}
        return {**super().settings, "fit": fit, "T": self.T, **self.rule_settings}

    @property
    def steps_per_image(self) -> int:
        """Optimiser steps of a fit of its own; none where it rides on another's."""
        return self.make_rule().steps_needed(self.T)

    @property
    def dip_fits(self) -> tuple[FitOptions, ...]:
        """Its one."""
        return (self.fit_options,)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """The images' own size.

        Raises:
            ValueError: The image is too small for the network.
        """
        resolve(self.fit_options.network).check_size(height, width)
        return height, width

    def stop(self, images: Tensor, indices: list[int]) -> Stopped:
        """Fit checked images [N, 3, H, W] stack by stack; the reconstructions chosen, like ``images``, and their t."""
        device = fit_device("auto", victim=self.victim, images=images)

        def work(part: slice, first_step: int, progress: FitProgress) -> Stopped:
            return stop_stack(
                images[part],
                self.asked,
                store=self.store,
                indices=indices[part],
                fit=self.fit_options,
                device=device,
                progress=progress,
            )

        size = self.choose_stack_size(images)
        steps, progress = self.steps_per_image, self.progress
        parts = list(in_stacks(len(images), size=size, T=steps, work=work, device=device, progress=progress))
        chosen = torch.cat([part.images for part in parts]).to(images)
        return Stopped(chosen, torch.cat([part.steps for part in parts]).cpu())

    def choose_stack_size(self, images: Tensor) -> int:
        """How many of ``images`` are fitted at once (:func:`dipguard.fit.stack_size.choose_stack_size`)."""
        if self.stack_size is not None:
            return self.stack_size
        return stack_size_of(
            images, victim=self.victim, fits=[self.fit_options], T=self.steps_per_image, kept=self.images_kept
        )

    def purify_images(self, images: Tensor, indices: list[int]) -> Tensor:
        """See `stop`."""
        return self.stop(images, indices).images

    def purify_one(self, image: Tensor, index: int) -> Tensor:
        """A stack of one."""
        return self.stop(image[None], [index]).images[0]


class FixedStepDIP(StoppedDIP):
    """DIP stopped at a fixed step (Kattamis et al. 2019; Sutanto and Lee 2020), as for denoising.

    Both stop a DIP fit after so many steps, the same for every image; how many belongs to the fit. 500 is half of the
    T of Ding et al. 2021 on CIFAR-10 and was not tuned: of 16 tuning images (CIFAR ResNet-56), steps from 500 to 999
    kept 10 to 12 under PGD at 8/255 and 12 to 15 without an attack, so few images do not tell them apart. Later steps
    favour clean images and cost more; no step is the right one for clean and attacked images alike, which is why the
    other rules exist. It falls to whoever differentiates through the fit, or steps over it (BPDA, Athalye et al. 2018).

    Args:
        victim: As in `StoppedDIP`.
        step: t, below T; a fit of its own ends there.
        fit: As in `StoppedDIP`.
        T: As in `StoppedDIP`.
        seed: As in `StoppedDIP`.
        stack_size: As in `StoppedDIP`.
        progress: As in `StoppedDIP`.
        store: As in `StoppedDIP`.
    """

    name: ClassVar[str] = "dip_fixed"

    def __init__(
        self,
        victim: nn.Module,
        *,
        step: int = 500,
        fit: Mapping[str, Any] | FitOptions | None = None,
        T: int = 1000,
        seed: int = 0,
        stack_size: int | None = None,
        progress: bool = True,
        store: str | Path | TraceStore | None = None,
    ) -> None:
        super().__init__(victim, fit=fit, T=T, seed=seed, stack_size=stack_size, progress=progress, store=store)
        self.step = check_int(step, name="step", low=0, high=self.T - 1)

    @property
    def rule_settings(self) -> dict[str, Any]:
        """The step."""
        return {"step": self.step}

    def make_rule(self) -> FixedStep:
        """See `dipguard.decision.stopping.FixedStep`."""
        return FixedStep(self.step)


class WindowedVarianceDIP(StoppedDIP):
    """ES-WMV (Wang et al. 2023): stopped where a window of reconstructions varies least.

    Its authors restore images; nobody has claimed it as a defence. With their window and patience, and T = 1000, the
    variance of this fit falls nearly to the end: on 16 tuning CIFAR-10 images it chose steps from 851 to 999.
    Patience plays a part only where T is above window + patience.

    Args:
        victim: As in `StoppedDIP`.
        window: W, from 2 to T.
        patience: P, at least 1; with P of T or more, the rule looks at the whole fit.
        fit: As in `StoppedDIP`.
        T: As in `StoppedDIP`; a fit of its own ends once all images of a stack have stopped.
        seed: As in `StoppedDIP`.
        stack_size: As in `StoppedDIP`.
        progress: As in `StoppedDIP`.
        store: As in `StoppedDIP`.
    """

    name: ClassVar[str] = "dip_es_wmv"

    def __init__(
        self,
        victim: nn.Module,
        *,
        window: int = 100,
        patience: int = 1000,
        fit: Mapping[str, Any] | FitOptions | None = None,
        T: int = 1000,
        seed: int = 0,
        stack_size: int | None = None,
        progress: bool = True,
        store: str | Path | TraceStore | None = None,
    ) -> None:
        super().__init__(victim, fit=fit, T=T, seed=seed, stack_size=stack_size, progress=progress, store=store)
        self.window = check_int(window, name="window", low=2, high=self.T)
        self.patience = check_int(patience, name="patience", low=1)

    @property
    def images_kept(self) -> int:
        """The window's, the choice, and a sum of twice the precision."""
        return self.window + 3

    @property
    def rule_settings(self) -> dict[str, Any]:
        """Window and patience."""
        return {"window": self.window, "patience": self.patience}

    def make_rule(self) -> WindowedVariance:
        """See `dipguard.decision.stopping.WindowedVariance`."""
        return WindowedVariance(window=self.window, patience=self.patience)
