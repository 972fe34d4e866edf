"""Runs one stacked fit on a Lightning Trainer, inside whatever the caller is doing."""

from __future__ import annotations

import logging
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn

from dipguard.checks import check_choice, check_int
from dipguard.classifier import check_is_module
from dipguard.decision import DecisionTrace, Reconstruction, sampled_steps
from dipguard.decision.boundary import SCORES, SEARCHES
from dipguard.engines.precision import precision
from dipguard.fit.boundary_detector import BoundaryDetector
from dipguard.fit.cohort import Waiting
from dipguard.fit.decision_logger import DecisionLogger
from dipguard.fit.folded import VICTIM_SPEEDS, faster
from dipguard.fit.memory import kept_memory
from dipguard.fit.module import FitOptions, StackedDIP
from dipguard.fit.retire import Retirement
from dipguard.fit.stitcher import Stitcher, StitchOptions


@dataclass(frozen=True, kw_only=True)
class DecideOptions:
    """Which reconstructions the victim sees, and what of them is kept.

    Attributes:
        T: Optimiser steps (section 4.1: 1000 on CIFAR-10, 3000 on ImageNet).
        decisions: Number of sampled steps.
        every: Distance of sampled steps instead.
        N: Sections of the grid of Eq. 5.
        scores: ``logits`` or ``probabilities`` (Eq. 5).
        K_max: The largest K that a replay may ask for.
        keep_samples: Keep all sampled reconstructions.
        search: ``grid`` or ``bisection``, of that grid (:func:`dipguard.decision.boundary.localise`).
        victim_speed: ``as_is``, or ``folded`` to ask a copy whose normalisations are part of its convolutions, which
            rounds otherwise, or ``bfloat16`` for one whose products are shorter too
            (:func:`dipguard.fit.folded.faster`).
        patience: Samples without a new crossing after which an image that has its K crossings is fitted no further
            (:class:`~dipguard.fit.retire.Retirement`); None fits all images to the end, as the paper does.
    """

    T: int = 1000
    decisions: int | None = 200
    every: int | None = None
    N: int = 10
    scores: str = "logits"
    K_max: int = 25
    keep_samples: bool = False
    search: str = "grid"
    victim_speed: str = "as_is"
    patience: int | None = None

    def __post_init__(self) -> None:
        sampled_steps(self.T, decisions=self.decisions, every=self.every)
        check_int(self.N, name="N", low=1)
        check_choice(self.scores, SCORES, name="scores")
        check_int(self.K_max, name="K_max", low=1)
        check_choice(self.search, SEARCHES, name="search")
        check_choice(self.victim_speed, VICTIM_SPEEDS, name="victim_speed")
        if self.patience is not None:
            check_int(self.patience, name="patience", low=1)


@dataclass(frozen=True)
class StackResult:
    """What one stacked fit gave.

    Attributes:
        traces: One an image.
        reconstructions: One an image.
        seconds: ``start`` (up to the first step: choice of the engine, compilation, the Trainer's own start), ``fit``
            and ``decide`` (victim, SSIM, localisation, stitching).
    """

    traces: list[DecisionTrace]
    reconstructions: list[Reconstruction]
    seconds: dict[str, float]


class _FirstStep(pl.Callback):
    """When the first step began."""

    at: float | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.at is None:
            self.at = time.perf_counter()


def fit_stack(
    images: Tensor,
    *,
    victim: nn.Module,
    indices: Sequence[int],
    fit: FitOptions,
    decide: DecideOptions,
    stitch: StitchOptions,
    device: torch.device,
    logger: Logger | None = None,
    first_step: int = 0,
    callbacks: Sequence[pl.Callback] = (),
    slots: int | None = None,
) -> StackResult:
    """Fit B networks to B images, and defend each (Algorithm 1).

    May be called under no_grad or inference_mode and inside another Trainer's loop. The global random state, the
    gradient mode and the victim are left as they were.

    Args:
        images: x0, [B, 3, H, W] in [0, 1].
        victim: Takes [n, 3, H, W] in [0, 1], returns logits [n, C].
        indices: The images' indices.
        fit: How to fit.
        decide: What the victim sees.
        stitch: How a trace becomes an image.
        device: Where to fit.
        logger: A Lightning logger for the means over the stack.
        first_step: Added to the logger's step numbers.
        callbacks: More callbacks, run after ours.
        slots: Images fitted at once, where ``decide`` has a patience: the others take the places of those that leave.
            None: all.

    Raises:
        TypeError, ValueError: Bad images, options or victim.
    """
    start = time.perf_counter()
    victim = faster(check_is_module(victim), images, speed=decide.victim_speed)
    first_step_at, stitcher = _FirstStep(), Stitcher(stitch, settings=asdict(decide))
    own: list[DecisionLogger | BoundaryDetector | Retirement | Stitcher] = [
        DecisionLogger(
            victim,
            decisions=decide.decisions,
            every=decide.every,
            K_max=decide.K_max,
            keep_samples=decide.keep_samples,
            first_step=first_step,
        ),
        BoundaryDetector(victim, N=decide.N, scores=decide.scores, search=decide.search),
        stitcher,
    ]
    if decide.patience is not None:
        retirement = Retirement(stitch, patience=decide.patience)
        stitcher.settings["retired_by"] = retirement.settings
        own.insert(2, retirement)
    with apart(device):
        # A tensor made under inference_mode cannot be saved for backward: the module clones it, outside of that mode.
        waiting = None
        if slots is not None and slots < len(images) and decide.patience is not None:
            waiting = Waiting(images[slots:], tuple(int(i) for i in indices[slots:]), decide.T, slots)
        module = StackedDIP(images[:slots], indices=indices[:slots], options=fit, waiting=waiting)
        # With images waiting, no number of steps is too many: the last of them ends the fit.
        most = decide.T if waiting is None else decide.T * len(images)
        trainer = make_trainer(most, device=device, callbacks=[first_step_at, *own, *callbacks], logger=logger)
        trainer.fit(module)
    assert first_step_at.at is not None
    seconds = {"start": first_step_at.at - start, "decide": sum(getattr(callback, "seconds", 0.0) for callback in own)}
    seconds["fit"] = time.perf_counter() - first_step_at.at - seconds["decide"]
    return StackResult(stitcher.traces, stitcher.reconstructions, seconds)


def make_trainer(T: int, *, device: torch.device, callbacks: list[pl.Callback], logger: Logger | None) -> pl.Trainer:
    """A bare Trainer for T steps: no checkpoints, bars or summaries; never part of the caller's own process group."""
    cuda = device.type == "cuda"
    return pl.Trainer(
        max_steps=T,
        max_epochs=1,
        accelerator=device.type if device.type != "cuda" else "gpu",
        devices=[device.index or 0] if cuda else 1,
        # Our fits are independent: they never join a cluster or process group that the caller's Trainer belongs to.
        plugins=[LightningEnvironment()],
        logger=logger if logger is not None else False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        inference_mode=False,
    )


@contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """A Trainer inside changes nothing of what is around it, and nothing around it changes the Trainer."""
    # On a GPU torch computes float32 convolutions in TF32 unless told otherwise.
    exact, gradients = precision("float32", device), torch.enable_grad()
    with torch.inference_mode(False), gradients, random_state_kept(), quiet(), kept_memory(device), interrupts(), exact:
        yield


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the global random states back afterwards: Lightning's own context leaves them changed after an error."""
    problem: BaseException | None = None
    with isolate_rng():
        try:
            yield
        except BaseException as error:
            problem = error
    if problem is not None:
        raise problem


@contextmanager
def interrupts() -> Iterator[None]:
    """Let Ctrl-C stay Ctrl-C: a Trainer turns it into ``sys.exit`` and makes the process deaf to the next one."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def quiet() -> Iterator[None]:
    """Without a Trainer's start-up messages."""
    # It prints some lines when it is made; one for each stack would bury the progress bar.
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric|lightning")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
