"""Runs one stacked fit on a Lightning Trainer of its own, isolated from the caller's program."""

from __future__ import annotations

import ctypes
import gc
import inspect
import logging
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, ProgressBar, Timer
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason
from pytorch_lightning.loggers import Logger
from torch import Tensor, nn

from dipguard.checks import check_not_forked
from dipguard.classifier import device_of
from dipguard.decision import DecisionTrace, Reconstruction
from dipguard.fit.callbacks import BoundaryDetector, DecisionLogger, Stitcher
from dipguard.fit.module import StackedDIP
from dipguard.fit.options import DecideOptions, FitOptions, StitchOptions
from dipguard.precision import ProcessWide, exact_products
from dipguard.seeding import kept_rng

OWNED = (
    "max_steps", "max_epochs", "accelerator", "devices", "num_nodes", "strategy", "plugins", "callbacks", "logger",
    "num_sanity_val_steps", "inference_mode", "fast_dev_run", "barebones", "sync_batchnorm", "overfit_batches",
    "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "val_check_interval",
    "check_val_every_n_epoch",
)  # fmt: skip
"""Arguments of ``pl.Trainer`` that :func:`make_trainer` sets itself, or that would end fits early or change nothing."""
_log = logging.getLogger(__name__)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's numbers for them
KEEP = 2**31 - 1
# What the C library's own adaptation arrives at, at most, in a program that handles large blocks.
ADAPTED_MMAP, ADAPTED_TRIM = 32 * 2**20, 64 * 2**20


@dataclass(frozen=True)
class StackResult:
    """What one stacked fit gave: one trace and one reconstruction per image."""

    traces: list[DecisionTrace]
    reconstructions: list[Reconstruction]
    seconds: dict[str, float]  # of `run_fit`, and "decide" (victim, SSIM, localisation, stitching) out of "fit"


def run_fit(
    images: Tensor,
    *,
    T: int,
    indices: Sequence[int],
    fit: FitOptions,
    device: torch.device,
    callbacks: Sequence[pl.Callback] = (),
    logger: Logger | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Fit B networks to B images, for what the callbacks make of it.

    May be called under no_grad or inference_mode, inside another Trainer's loop, and in several threads at once. The
    global random state and the gradient mode are left as they were.

    ``images`` are x0, [B, 3, H, W] in [0, 1], with their ``indices``; T is the number of optimiser steps. ``device``,
    ``callbacks``, ``logger`` and ``trainer`` are those of :func:`make_trainer`. Returns seconds: ``start`` (up to the
    first step: choice of the engine, compilation, the Trainer's own start) and ``fit``. TypeError or ValueError for bad
    images or options, RuntimeError in a forked process that would hang, or if a callback or ``max_time`` ends the fit
    before its first step.
    """
    start = time.perf_counter()
    for callback in callbacks:
        _start_afresh(callback)
    with isolated_trainer(device):
        # A tensor made under inference_mode cannot be saved for backward: the module clones it, outside of that mode.
        module = StackedDIP(images, indices=indices, options=fit)
        module.in_run_fit = True
        made = make_trainer(T, device=device, callbacks=callbacks, logger=logger, trainer=trainer)
        try:
            made.fit(module)
            if not module.step:
                raise RuntimeError("the fit ended before its first step, by a callback or by `max_time` of the Trainer")
            if module.step < T and any(isinstance(callback, (EarlyStopping, Timer)) for callback in made.callbacks):  # type: ignore[attr-defined]
                _log.info("a fit of %d image(s) ended after %d of %d steps", len(images), module.step, T)
        finally:
            module.close()
            # Lightning's reference cycles, and the methods of the module that it sets on callbacks, would keep the fit.
            for callback in callbacks:
                vars(callback).pop("log", None)
                vars(callback).pop("log_dict", None)
            vars(made).clear()
    return {"start": module.began - start, "fit": time.perf_counter() - module.began}


_before: WeakKeyDictionary[pl.Callback, dict[str, Any]] = WeakKeyDictionary()
"""Attributes of Timers and checkpoints before their first fit."""


def _start_afresh(callback: pl.Callback) -> None:
    """Let a callback of Lightning's forget other images' fits: it would end this one at once, or save nothing of it."""

    def copied(attributes: Mapping[str, Any]) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, dict) else value for name, value in attributes.items()}

    if isinstance(callback, EarlyStopping):
        callback.wait_count, callback.stopped_epoch = 0, 0
        callback.best_score = torch.tensor(math.inf if callback.mode == "min" else -math.inf, device="cpu")
        callback.stopping_reason, callback.stopping_reason_message = EarlyStoppingReason.NOT_STOPPED, None
    elif isinstance(callback, (ModelCheckpoint, Timer)):
        vars(callback).update(copied(_before.setdefault(callback, copied(vars(callback)))))


def fit_stack(
    images: Tensor,
    *,
    victim: nn.Module,
    decide: DecideOptions,
    stitch: StitchOptions,
    first_step: int = 0,
    callbacks: Sequence[pl.Callback] = (),
    **run: Any,
) -> StackResult:
    """Fit B networks to B images, and rebuild each image (Algorithm 1).

    ``victim`` takes [n, 3, H, W] in [0, 1] and returns logits [n, C]; it is left as it was. ``first_step`` is added to
    the logger's step numbers; ``callbacks`` run after ours. Other arguments and errors are those of :func:`run_fit`.
    """
    sampling = {name: getattr(decide, name) for name in ("decisions", "every", "K_max")}
    sampler = DecisionLogger(victim, first_step=first_step, **sampling)
    detector, stitcher = BoundaryDetector(victim, N=decide.N, scores=decide.scores), Stitcher(**asdict(stitch))
    seconds = run_fit(images, T=decide.T, callbacks=[sampler, detector, stitcher, *callbacks], **run)
    seconds["decide"] = sampler.seconds + detector.seconds + stitcher.seconds
    seconds["fit"] -= seconds["decide"]
    return StackResult(stitcher.traces, stitcher.reconstructions, seconds)


def check_trainer(trainer: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return further keyword arguments of ``pl.Trainer``, such as ``precision`` or ``profiler``; empty for None.

    ValueError if one is among ``OWNED`` or clips gradients by their norm, which is that of all images of a stack.
    TypeError if ``pl.Trainer`` does not have it or ``trainer`` is no mapping.
    """
    if trainer is not None and not isinstance(trainer, Mapping):
        raise TypeError(f"`trainer` must be a mapping of arguments of pl.Trainer or None, got {trainer!r}")
    further = dict(trainer or {})
    for name, value in further.items():
        if name in OWNED:
            raise ValueError(f"`trainer` must leave `{name}` to the fit, got {name}={value!r}")
        if name not in inspect.signature(pl.Trainer).parameters:
            raise TypeError(f"`trainer` must hold arguments of pl.Trainer, got {name}={value!r}")
    algorithm = further.get("gradient_clip_algorithm")
    if further.get("gradient_clip_val") and str(getattr(algorithm, "value", algorithm)) != "value":
        raise ValueError(
            "`trainer` must clip gradients by value, since a norm is that of all images of a stack, got "
            f"gradient_clip_algorithm={algorithm!r}: give gradient_clip_algorithm='value'"
        )
    return further


def make_trainer(
    T: int,
    *,
    device: torch.device,
    callbacks: Sequence[pl.Callback] = (),
    logger: Logger | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> pl.Trainer:
    """A Trainer for T steps, never part of the caller's own process group.

    It has no summary, and a progress bar or checkpoints only if there are callbacks for them. ``trainer`` is that of
    :func:`check_trainer`.
    """
    further = check_trainer(trainer)
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
    made = pl.Trainer(**own)
    # SIGTERM stays the caller's. A Trainer would end the program with exit code 0.
    made._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return made


def trainer_precision(trainer: Mapping[str, Any] | None) -> str:
    """Lightning's name of the precision that a Trainer with these further arguments has: ``32-true`` by default."""
    asked, cpu = (trainer or {}).get("precision"), torch.device("cpu")
    if asked is None:
        return "32-true"
    with isolated_trainer(cpu):
        return str(make_trainer(1, device=cpu, trainer={"precision": asked}).precision)


def fit_device(victim: nn.Module, images: Tensor) -> torch.device:
    """The device of a fit: the victim's (the images', if it has no tensors), or the CPU if that is no CUDA device."""
    device = device_of(victim, images.device)
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


@contextmanager
def isolated_trainer(device: torch.device) -> Iterator[None]:
    """Isolate a Trainer from its surroundings: random state, gradient mode, TF32, Ctrl-C, warnings, freed memory."""
    check_not_forked()
    exact = torch.autocast(device.type, enabled=False)
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()  # a Trainer leaves its own current
    # On a GPU torch computes float32 convolutions in TF32 unless told otherwise.
    shared = _fits.inside(_unchanged, quiet, partial(kept_memory, device), exact_products)
    with torch.inference_mode(False), torch.enable_grad(), exact, current, interrupts(), kept_rng(), shared:
        yield


_fits = ProcessWide()


@contextmanager
def _unchanged() -> Iterator[None]:
    """Put back what a Trainer's ``deterministic`` changes."""

    def flags() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    strict, warn_only = flags()
    try:
        yield
    finally:
        if flags() != (strict, warn_only):  # it may overwrite more than these
            torch.use_deterministic_algorithms(strict, warn_only=warn_only)


@contextmanager
def kept_memory(device: torch.device) -> Iterator[bool]:
    """Let the C library hold on to freed blocks while a fit runs on the CPU; give them back at the end.

    Otherwise it hands the blocks of each step back to the system, which maps and clears every page anew: a tenth to a
    fifth of the time of a fit by torch's engine (benchmarks/README.md). Only glibc has the switch, which is the whole
    process's; afterwards it stands where glibc's own adaptation would have put it. Yields whether memory is kept.
    """
    libc = _glibc(device)
    if libc is None:
        yield False
        return
    if not libc.mallopt(M_MMAP_THRESHOLD, KEEP):  # more than an older glibc allows
        libc.mallopt(M_MMAP_THRESHOLD, ADAPTED_MMAP)
    libc.mallopt(M_TRIM_THRESHOLD, KEEP)
    try:
        yield True
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, ADAPTED_MMAP)
        libc.mallopt(M_TRIM_THRESHOLD, ADAPTED_TRIM)
        libc.malloc_trim(0)


def free(device: torch.device) -> None:
    """Return unused memory, also what an error's traceback and Lightning's reference cycles have held."""
    gc.collect()
    libc = _glibc(device)
    if libc is not None:
        libc.malloc_trim(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _glibc(device: torch.device) -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" and device.type == "cpu" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


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
    """Silence a Trainer's start-up messages: one set of them for each stack would bury the progress bar.

    Messages of profilers and of most callbacks stay: the caller asked for them.
    """
    with warnings.catch_warnings(), ExitStack() as put_back:
        warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric|lightning")
        for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
            logger = logging.getLogger(name)
            for part in ("profilers", "callbacks"):
                asked = logging.getLogger(f"{name}.{part}")
                put_back.callback(asked.setLevel, asked.level)
                asked.setLevel(asked.getEffectiveLevel())
            put_back.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield
