"""Runs one stacked fit on a Lightning Trainer of its own, isolated from the caller's program."""

from __future__ import annotations

import logging
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.callbacks import Checkpoint, ProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn

from dipguard.classifier import check_is_module, device_of
from dipguard.decision import DecisionTrace, Reconstruction
from dipguard.engines.precision import precision
from dipguard.fit.callbacks import BoundaryDetector, DecisionLogger, Stitcher
from dipguard.fit.memory import kept_memory
from dipguard.fit.module import StackedDIP
from dipguard.fit.options import DecideOptions, FitOptions, StitchOptions

ACCELERATORS = ("auto", "cpu", "gpu")
"""``auto`` is the victim's device."""
OWNED = (
    "max_steps", "max_epochs", "accelerator", "devices", "plugins", "callbacks", "logger", "num_sanity_val_steps",
    "inference_mode",
)  # fmt: skip
"""Arguments of ``pl.Trainer`` that :func:`make_trainer` sets itself."""


@dataclass(frozen=True)
class StackResult:
    """What one stacked fit gave.

    Attributes:
        traces: One per image.
        reconstructions: One per image.
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
    trainer: Mapping[str, Any] | None = None,
) -> StackResult:
    """Fit B networks to B images, and rebuild each image (Algorithm 1).

    May be called under no_grad or inference_mode and inside another Trainer's loop. The global random state, the
    gradient mode and the victim are left as they were.

    Args:
        images: x0, [B, 3, H, W] in [0, 1].
        victim: Takes [n, 3, H, W] in [0, 1], returns logits [n, C].
        indices: The images' indices.
        fit: How to fit.
        decide: What the victim classifies.
        stitch: How a trace becomes an image.
        device: Where to fit.
        logger: A Lightning logger for the means over the stack.
        first_step: Added to the logger's step numbers.
        callbacks: Further callbacks, run after ours.
        trainer: Further keyword arguments of ``pl.Trainer``; see :func:`make_trainer`.

    Raises:
        TypeError, ValueError: Bad images, options or victim.
    """
    start = time.perf_counter()
    check_is_module(victim)
    first_step_at, stitcher = _FirstStep(), Stitcher(**asdict(stitch))
    own: list[DecisionLogger | BoundaryDetector | Stitcher] = [
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
    with isolated_trainer(device):
        # A tensor made under inference_mode cannot be saved for backward: the module clones it, outside of that mode.
        module = StackedDIP(images, indices=indices, options=fit)
        every = [first_step_at, *own, *callbacks]
        make_trainer(decide.T, device=device, callbacks=every, logger=logger, trainer=trainer).fit(module)
    assert first_step_at.at is not None
    seconds = {"start": first_step_at.at - start, "decide": sum(callback.seconds for callback in own)}
    seconds["fit"] = time.perf_counter() - first_step_at.at - seconds["decide"]
    return StackResult(stitcher.traces, stitcher.reconstructions, seconds)


def make_trainer(
    T: int,
    *,
    device: torch.device,
    callbacks: Sequence[pl.Callback] = (),
    logger: Logger | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> pl.Trainer:
    """A Trainer for T steps, never part of the caller's own process group.

    It has no progress bar, no summary and, unless there is a checkpoint callback, no checkpoints.

    Args:
        T: Optimiser steps.
        device: Where to fit.
        callbacks: Its callbacks.
        logger: A Lightning logger, or None.
        trainer: Further keyword arguments of ``pl.Trainer``, such as ``precision`` or ``profiler``; none of ``OWNED``.

    Raises:
        ValueError: ``trainer`` holds an argument that is set here.
        TypeError: ``trainer`` holds one that ``pl.Trainer`` does not have.
    """
    further = dict(trainer or {})
    for name in OWNED:
        if name in further:
            raise ValueError(f"`trainer` must leave `{name}` to the fit, got {name}={further[name]!r}")
    cuda = device.type == "cuda"
    own: dict[str, Any] = {
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in callbacks),
        "enable_model_summary": False,
        **further,
        "max_steps": T,
        "max_epochs": -1,
        "accelerator": "gpu" if cuda else device.type,
        "devices": [device.index or 0] if cuda else 1,
        # Our fits are independent: they never join a cluster or process group of the caller's Trainer.
        "plugins": [LightningEnvironment()],
        "logger": logger if logger is not None else False,
        "callbacks": list(callbacks),
        "num_sanity_val_steps": 0,
        "inference_mode": False,
    }
    return pl.Trainer(**own)


def fit_device(accelerator: str, *, victim: nn.Module, images: Tensor) -> torch.device:
    """The device of a fit, by one of ``ACCELERATORS``.

    Raises:
        ValueError: ``gpu`` on a machine without one.
    """
    if accelerator == "cpu":
        return torch.device("cpu")
    if accelerator == "gpu":
        if not torch.cuda.is_available():
            raise ValueError("`accelerator` must be 'cpu' or 'auto' on a machine without a GPU, got 'gpu'")
        return images.device if images.device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    device = device_of(victim, images.device)
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


@contextmanager
def isolated_trainer(device: torch.device) -> Iterator[None]:
    """Isolate a Trainer from its surroundings: random state, gradient mode, TF32, Ctrl-C, warnings, freed memory."""
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
    """Keep Ctrl-C a KeyboardInterrupt: a Trainer turns it into ``sys.exit`` and ignores the next one."""
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
    """Silence a Trainer's start-up messages."""
    # One set of them for each stack would bury the progress bar.
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
