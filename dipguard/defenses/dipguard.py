"""The proposed defence (Ding et al. 2021, Algorithm 1), for any number of images."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor, nn

from dipguard.checks import check_choice, check_images, check_int
from dipguard.classifier import probability_warning
from dipguard.decision import DecisionTrace, Reconstruction
from dipguard.defenses.guard_stack import check_storable, defend_stack, each_stack, store_keys
from dipguard.defenses.guard_stack import stack_size as stack_size_for
from dipguard.defenses.result import DefenseResult
from dipguard.fit import (
    ACCELERATORS,
    DecideOptions,
    Decider,
    FitOptions,
    FitProgress,
    StitchOptions,
    fit_device,
)
from dipguard.networks import NetworkSpec
from dipguard.store import TraceStore, open_store


class DIPGuard(nn.Module):
    """A training-free defence: fit an untrained U-Net to each image, stitch what it shows at the decision boundary.

    Accuracy was shown by Ding et al. under transferred and identity-BPDA attacks. Purifiers with no more evidence
    than that have fallen to adaptive ones (Athalye et al. 2018; Tramer et al. 2020; Croce et al. 2022): take no
    robustness for granted.

    Args:
        victim: Takes [n, 3, H, W] in [0, 1], returns logits [n, C]; normalisation belongs inside. Never changed.
        network: A preset of appendix B (cifar10, imagenet, small, medium, large) or a
            :class:`~dipguard.networks.NetworkSpec`.
        T: Optimiser steps.
        tau: Quality threshold of Eq. 3, in [0, 1].
        t0: Warm-up of Eq. 3.
        K: Number of on-boundary images that are stitched.
        beta: Step size of Eq. 6, at least 0.
        seed: With an image's index, settles every random draw of its fit.
        decisions: Number of reconstructions that the victim reads along the fit, at most T.
        every: Distance of those in steps, instead of their number.
        N: Sections of the grid of Eq. 5.
        K_max: The largest K that the traces can be replayed with; at least K. None takes the larger of K and 25.
        scores: ``logits`` or ``probabilities`` (Eq. 5).
        search: ``grid``, or ``bisection``: a third of the readings (:func:`dipguard.decision.boundary.localise`).
        victim_speed: ``as_is``; ``folded`` or ``bfloat16``: faster copies (:mod:`dipguard.fit.folded`); no store then.
        rule: ``at_least`` (>=, Algorithm 1) or ``above`` (>, Eq. 3).
        t0_unit: ``steps`` or ``samples``.
        divide_by: ``found`` or ``K`` (Eq. 7 with fewer than K crossings).
        keep_samples: Keep all sampled reconstructions in the traces.
        z: ``uniform`` or ``gaussian``.
        z_scale: Upper end or standard deviation of z; None takes the preset's.
        jitter: Standard deviation of the noise on z at each step; 0 for none.
        init: ``default`` or ``xavier``.
        padding: ``zeros`` or ``reflect``.
        lr: Adam's learning rate.
        dtype: ``float32`` or ``float64`` for the fit.
        precision: ``float32``; ``tf32`` or ``bfloat16`` with engine ``torch`` or ``cuda_graph`` change results.
        engine: ``torch``, ``native`` (C++, on a CPU; there by far the fastest), ``cuda_graph`` or ``auto``.
        stack_size: Images fitted at once, fewer once memory has run out; None chooses by free memory and speed.
            No image's result depends on it (in exact arithmetic; but for the native engine, Adam amplifies rounding).
        patience: Samples without a new crossing after which an image that has its K crossings is fitted no further and
            gives its place to another: faster, and results may change. None fits all to the end, as the paper does.
        accelerator: ``auto`` (where the victim is), ``cpu`` or ``gpu``.
        progress: Show a progress bar.
        store: Folder of fits made earlier (:mod:`dipguard.store`), which other tau, t0, K, beta, victims and T replay;
            not together with ``patience``. Traces in the result are then shared and must not be changed.
        store_T: Other T that a fit made for the store shall serve: it is as long as the longest of them.

    Attributes:
        watch: Is shown the traces of every stack, made or found in a store; None: nobody.

    Raises:
        TypeError, ValueError: An option is out of range; the message names it.
    """

    def __init__(
        self,
        victim: nn.Module,
        *,
        network: str | NetworkSpec = "cifar10",
        T: int = 1000,
        tau: float = 0.7,
        t0: int = 50,
        K: int = 15,
        beta: float = 0.5,
        seed: int = 0,
        decisions: int | None = 200,
        every: int | None = None,
        N: int = 10,
        K_max: int | None = None,
        scores: str = "logits",
        search: str = "grid",
        victim_speed: str = "as_is",
        rule: str = "at_least",
        t0_unit: str = "steps",
        divide_by: str = "found",
        keep_samples: bool = False,
        z: str = "uniform",
        z_scale: float | None = None,
        jitter: float = 0.0,
        init: str = "default",
        padding: str = "zeros",
        lr: float = 0.01,
        dtype: str = "float32",
        precision: str = "float32",
        engine: str = "auto",
        stack_size: int | None = None,
        patience: int | None = None,
        accelerator: str = "auto",
        progress: bool = True,
        store: str | Path | TraceStore | None = None,
        store_T: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.stitch_options = StitchOptions(
            tau=tau, t0=t0, K=K, beta=beta, rule=rule, t0_unit=t0_unit, divide_by=divide_by
        )
        self.decide_options = DecideOptions(
            T=T,
            decisions=None if every is not None else decisions,
            every=every,
            N=N,
            scores=scores,
            search=search,
            victim_speed=victim_speed,
            K_max=max(K, 25) if K_max is None else check_int(K_max, name="K_max", low=K),
            keep_samples=keep_samples,
            patience=patience,
        )
        readings: dict[str, Any] = {"z": z, "z_scale": z_scale, "jitter": jitter, "init": init, "padding": padding}
        numbers: dict[str, Any] = {"dtype": dtype, "precision": precision, "engine": engine}
        self.fit_options = FitOptions(network=network, seed=seed, lr=lr, **numbers, **readings)
        self.stack_size = None if stack_size is None else check_int(stack_size, name="stack_size", low=1)
        self.accelerator = check_choice(accelerator, ACCELERATORS, name="accelerator")
        self.progress = progress
        self.store = open_store(store)
        if self.store is not None:
            check_storable(self.decide_options)
        others = tuple(replace(self.decide_options, T=other) for other in store_T)
        self.also = () if self.store is None else others
        self.watch: Callable[[Sequence[DecisionTrace]], None] | None = None
        self.decide = Decider(victim)
        self.victim = victim

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that a result depends on besides the images and the victim, as JSON can hold it."""
        return {**self.fit_options.as_settings(), **asdict(self.decide_options), **asdict(self.stitch_options)}

    @property
    def steps_per_image(self) -> int:
        """Optimiser steps that one image costs, T (fewer for some with ``patience``)."""
        return self.decide_options.T

    def choose_stack_size(self, images: Tensor) -> int:
        """How many of ``images`` are fitted at once: ``stack_size``, or what is chosen for a job of so many.

        Choosing may compile the engine and may run some steps (:func:`dipguard.fit.stack_size.choose_stack_size`).
        """
        return stack_size_for(self, images)

    def rebuild(self, trace: DecisionTrace) -> Reconstruction:
        """The purified image that follows from a trace (Algorithm 1, lines 9-18)."""
        return self.stitch_options.apply(trace)

    def defend_stacks(
        self,
        images: Tensor,
        *,
        indices: Sequence[int] | Tensor | None = None,
        logger: Logger | None = None,
        stack_size: int | None = None,
    ) -> Iterator[DefenseResult]:
        """Defend images stack by stack, giving each stack's result as soon as it is there.

        Args:
            images: [N, 3, H, W] in [0, 1].
            indices: Their indices in the data set, which settle their random draws; 0 ... N-1 by default.
            logger: A Lightning logger for the means over each stack.
            stack_size: Images fitted at once; None asks :meth:`choose_stack_size`.

        Raises:
            TypeError, ValueError: Bad images, indices or victim; before the first fit.
            torch.OutOfMemoryError, MemoryError, RuntimeError: The memory does not hold the fit of a single image.
        """
        check_images(images)
        order = list(range(len(images))) if indices is None else [int(i) for i in indices]
        if len(order) != len(images):
            raise ValueError(f"`indices` must hold one index an image ({len(images)}), got {len(order)}")
        logits = self._check_victim(images[:1])
        start = time.perf_counter()
        keys = store_keys(self, images, order, logits=logits)
        size = stack_size_for(self, images, keys=keys) if stack_size is None else stack_size
        choosing = time.perf_counter() - start

        def work(part: slice, first_step: int, progress: FitProgress) -> DefenseResult:
            more: dict[str, Any] = {"logger": logger, "first_step": first_step, "progress": progress}
            return defend_stack(self, images[part], order[part], keys=keys and keys.part(part), **more)

        for result in each_stack(self, len(images), size=size, work=work, device=self.device_of(images)):
            result.seconds["start"] += choosing
            choosing = 0.0
            yield result

    def defend(
        self, images: Tensor, *, indices: Sequence[int] | Tensor | None = None, logger: Logger | None = None
    ) -> DefenseResult:
        """Defend images; see :meth:`defend_stacks` for the arguments and errors."""
        return DefenseResult.join(list(self.defend_stacks(images, indices=indices, logger=logger)))

    def purify(self, images: Tensor, *, indices: Sequence[int] | Tensor | None = None) -> Tensor:
        """[N, 3, H, W] in [0, 1] -> reconstructions of the same shape, range, dtype and device.

        ``indices`` are as in :meth:`defend_stacks`.
        """
        return self.defend(images, indices=indices).reconstructions

    def forward(self, images: Tensor) -> Tensor:
        """The victim's logits on the purified images, [N, C]."""
        return self.decide(self.purify(images))

    def _check_victim(self, images: Tensor) -> Tensor:
        logits = self.decide(images)
        text = probability_warning(logits)
        if text is not None:
            warnings.warn(text, UserWarning, stacklevel=3)
        return logits

    def device_of(self, images: Tensor) -> torch.device:
        """Where these images are fitted."""
        return fit_device(self.accelerator, victim=self.victim, images=images)
