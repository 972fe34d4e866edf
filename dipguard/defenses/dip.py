"""What all defences that fit a deep image prior share: options of the fit, stacks of images, and their Trainers."""

from __future__ import annotations

import time
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from operator import attrgetter
from typing import Any, ClassVar

import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor, nn

from dipguard.checks import check_bool, check_choice, check_int
from dipguard.classifier import input_size, probability_warning
from dipguard.decision.quality import SMALLEST_SIDE
from dipguard.defenses.base import Callbacks, Defense, Purified
from dipguard.files import as_json
from dipguard.fit import FitOptions, FitProgress, check_trainer, fit_device, in_stacks, stack_size_for
from dipguard.networks import NetworkSpec
from dipguard.registry import check_options

PHOTOGRAPH = 96
"""From this height or width on, an image is a photograph, with the preset ``imagenet``."""


def preset_for(size: tuple[int, int] | None) -> str:
    """Return the preset for images of this height and width: ``imagenet``, or ``cifar10`` if small or not known."""
    return "imagenet" if size is not None and max(size) >= PHOTOGRAPH else "cifar10"


class DIPDefense(Defense):
    """A defence that fits untrained networks to each image, several images at once.

    A subclass implements `_purify_stack`, `steps_per_purification` and `images_kept`. TypeError or ValueError if an
    option is unknown or out of range; the message names it. ``fit_options`` is how each image is fitted.

    Args:
        network: A preset of appendix B (``cifar10``, ``imagenet``, ``small``, ``medium``, ``large``) or a
            :class:`~dipguard.networks.NetworkSpec`.
        stack_size: Images fitted at once, at least 1; fewer once memory has run out; None takes 32 on a CPU and 256 on
            a GPU, bounded by free memory. With the native engine no fit depends on it; the others round differently in
            a stack of another size, and Adam amplifies that.
        votes: Purifications of each image, at least 1, each with draws of its own. The class that the victim assigns to
            most of them wins; the cost grows in proportion.
        progress: Show a progress bar, unless a `FitProgress` is among the callbacks.
        trainer: Further keyword arguments of ``pl.Trainer`` for each fit, such as a profiler. ValueError for those that
            a fit sets itself (:data:`dipguard.fit.runner.OWNED`).
        fit: Fields of :class:`~dipguard.fit.FitOptions`, such as ``jitter``, ``lr``, ``dtype`` or ``engine``.
    """

    FIT: ClassVar[dict[str, Any]] = {}
    """Where the fit differs from FitOptions' defaults; None stands for a value that the constructor chooses."""
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Values, by preset, of the options that may be None."""
    random = True  # weights, z and jitter are drawn
    asks_victim: ClassVar[bool] = True
    """Whether the victim's logits choose the result."""
    chosen_by_size: bool = False

    def __init__(
        self,
        victim: nn.Module,
        *,
        network: str | NetworkSpec = "cifar10",
        seed: int | None = 0,
        votes: int = 1,
        stack_size: int | None = None,
        progress: bool = True,
        trainer: Mapping[str, Any] | None = None,
        **fit: Any,
    ) -> None:
        super().__init__(victim, seed=seed)
        self.votes = check_int(votes, name="votes", low=1)
        if not fit.keys() <= {field.name for field in fields(FitOptions)}:
            check_options(type(self), fit, owner=f"the defence {self.name!r}")
        own = {name: value for name, value in self.FIT.items() if value is not None}
        self.fit_options = FitOptions(network=network, seed=self.seed, **{**own, **fit})
        self.dip_fits = (self.fit_options,)
        self.stack_size = None if stack_size is None else check_int(stack_size, name="stack_size", low=1)
        self.progress = check_bool(progress, name="progress")
        self.trainer = check_trainer(trainer)

    def from_preset(self, preset: str | None, given: Mapping[str, Any], *, victim: nn.Module) -> dict[str, Any]:
        """Return ``given``, with a preset's value in place of each of its options that is None or missing.

        If ``preset`` is None, the victim's ``size`` chooses. A constructor calls this before that of its base class.
        """
        self.chosen_by_size = preset is None
        by_size = preset_for(input_size(victim))
        self.preset = by_size if preset is None else check_choice(preset, self.PRESETS, name="preset")
        chosen = self.PRESETS[self.preset]
        return {**given, **{name: value for name, value in chosen.items() if given.get(name) is None}}

    @property
    @abstractmethod
    def images_kept(self) -> int:
        """Reconstructions of one image that are held in memory during a fit, at most."""

    @property
    def longest_fit(self) -> int:
        """Optimiser steps of one purification as it is fitted now, which may serve more than this call."""
        return self.steps_per_purification

    @property
    def settings(self) -> dict[str, Any]:
        """The options, those of the fit (a list ``fit`` if there are several) and further ones of its Trainer."""
        made = [{name: v for name, v in fit.as_settings().items() if name != "seed"} for fit in self.dip_fits]
        fits: dict[str, Any] = made[0] if len(made) == 1 else {"fit": made}
        if self.trainer:
            fits["trainer"] = as_json(self.trainer)
        return {**super().settings, **fits}

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the given size; ValueError if it is too small for a network, or not the preset's."""
        if self.chosen_by_size and preset_for((height, width)) != self.preset:
            raise ValueError(
                f"`preset` must be given for images of {height}x{width} pixels, since the victim does not say that it "
                "reads such images: 'imagenet' for photographs, 'cifar10' for small images"
            )
        for fit in self.dip_fits:
            fit.spec.check_size(height, width)
        if min(height, width) < SMALLEST_SIDE:
            raise ValueError(f"`images` must be at least {SMALLEST_SIDE} pixels a side for SSIM, got {height}x{width}")
        return height, width

    @abstractmethod
    def _purify_stack(self, images: Tensor, indices: list[int], run: dict[str, Any], *, first_step: int) -> Purified:
        """Purify one stack of checked images [B, 3, H, W]; ``first_step`` is added to the logger's step numbers.

        ``run`` holds ``device``, ``callbacks``, ``logger`` and ``trainer`` for :func:`~dipguard.fit.run_fit`.
        """

    def _purify(self, images: Tensor, indices: list[int], *, callbacks: Callbacks, logger: Logger | None) -> Purified:
        """Purify stack by stack."""
        return Purified.join(list(self._stacks(images, indices, callbacks=callbacks, logger=logger)))

    def _purify_alone(self, images: Tensor, indices: list[int]) -> Tensor:
        """Purify stack by stack, and keep no traces, which would take a megabyte an image and more."""
        if type(self)._purify is not DIPDefense._purify:  # what a subclass does there belongs to the result
            return super()._purify_alone(images, indices)
        images_of = attrgetter("reconstructions")  # a loop's variable would hold the stack before
        return torch.cat(list(map(images_of, self._stacks(images, indices, callbacks=(), logger=None))))

    def _stacks(
        self, images: Tensor, indices: list[int], *, callbacks: Callbacks, logger: Logger | None
    ) -> Iterator[Purified]:
        """The stacks of the images, each purified when it is its turn."""
        if self.asks_victim and (text := probability_warning(self.decide(images[:1]))):
            warnings.warn(text, UserWarning, stacklevel=4)
        start, count, (height, width) = time.perf_counter(), len(images), images.shape[-2:]
        device, fits = fit_device(self.victim, images), self.dip_fits
        how: Any = {"kept": self.images_kept, "device": device, "trainer": self.trainer, "asked": self.stack_size}
        how |= {"size": (height, width), "T": self.longest_fit // len(fits)}
        size = min(stack_size_for(count, fit=fit, **how) for fit in {replace(fit, seed=0) for fit in fits})
        choosing = time.perf_counter() - start

        def work(part: slice, first_step: int, progress: FitProgress) -> Purified:
            run = {"device": device, "callbacks": [progress, *callbacks], "logger": logger, "trainer": self.trainer}
            made = self._purify_stack(images[part], indices[part], run, first_step=first_step)
            made.seconds["start"] += choosing * (part.start == 0)
            # A store may have saved steps, or all of the fit.
            done = progress.bar.n + (count - part.stop) * self.longest_fit
            progress.skip(int((progress.bar.total or done) - done))
            return made

        show = self.progress and not any(isinstance(callback, FitProgress) for callback in callbacks)
        return in_stacks(count, size=size, T=self.longest_fit, work=work, device=device, progress=show)
