"""Many images in stacks: how many at once, and smaller stacks if memory runs out."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from tqdm import tqdm

from dipguard.classifier import is_out_of_memory
from dipguard.engines.base import SHORT, make_engine, say_once
from dipguard.fit.callbacks import as_stacked_dip
from dipguard.fit.memory import free_memory, memory_need
from dipguard.fit.module import StackedDIP
from dipguard.fit.options import FitOptions
from dipguard.fit.runner import free, isolated_trainer, trainer_precision

SIZES = {"cpu": 32, "cuda": 256}
"""Images at once, if memory allows."""
OURS = 0.5
"""Share of the free memory that a fit may take: the victim and other programs need some too."""


class FitProgress(pl.Callback):
    """Advances a tqdm bar, whose total is images x T, by image-steps."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self.bar = bar
        self._done = self._skipped = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """Count this step."""
        images = len(as_stacked_dip(pl_module).indices)
        self.bar.update(images)
        self._done += images

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take steps that the fit has not needed off the bar's total."""
        module = as_stacked_dip(pl_module)
        self.skip(len(module.indices) * (module.T - module.step))

    def skip(self, image_steps: int) -> None:
        """Take image-steps that need not be fitted off the bar's total."""
        if image_steps and self.bar.total is not None:
            self.bar.total -= image_steps
            self._skipped += image_steps
            self.bar.refresh()

    def roll_back(self) -> None:
        """Take everything back, because the stack is fitted again from its start."""
        self.bar.update(-self._done)
        self.skip(-self._skipped)
        self._done = self._skipped = 0


Result = TypeVar("Result")
Work = Callable[[slice, int, FitProgress], Result]
"""Fits a slice of the images; called with the number of its first step in the log, and a callback for the Trainer."""


def in_stacks(
    count: int, *, size: int, T: int, work: Work[Result], device: torch.device, progress: bool
) -> Iterator[Result]:
    """Yield the results of ``work`` on one stack of images after the other, each of ``size`` images and T steps.

    If memory runs out, the stack is halved and begun again; later ones stay as small. One warning says so. If a single
    image is too large, torch.OutOfMemoryError, MemoryError or RuntimeError is raised; the message names remedies.
    """
    first, calls, warned = 0, 0, False
    look: dict[str, Any] = {"desc": "fit", "unit": "step", "unit_scale": True, "dynamic_ncols": True}
    with tqdm(total=count * T, disable=not progress, **look) as bar:
        while first < count:
            part, watch, calls = slice(first, min(first + size, count)), FitProgress(bar), calls + 1
            images = part.stop - part.start
            try:
                yield work(part, (calls - 1) * T, watch)
                first = part.stop
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                watch.roll_back()
                if images == 1:
                    kind = next(k for k in (torch.OutOfMemoryError, MemoryError, RuntimeError) if isinstance(error, k))
                    raise kind(
                        "a single image at a time is too much for the memory: free some, or take smaller images, a "
                        f"smaller `network` or a smaller `K_max` ({error})"
                    ) from error
                size, problem = (images + 1) // 2, (str(error).splitlines() or ["no memory"])[0]
            # Only now: the error would hold the memory of the failed fit.
            if not warned:
                text = f"out of memory with {images} images at once; going on with {size} (`stack_size`): {problem}"
                warnings.warn(text, UserWarning, stacklevel=3)
            warned = True
            free(device)


def stack_size_for(
    count: int,
    *,
    size: tuple[int, int],
    fit: FitOptions,
    T: int,
    kept: int,
    device: torch.device,
    trainer: Mapping[str, Any] | None = None,
    asked: int | None = None,
) -> int:
    """How many of ``count`` images to fit at once; the log tells the memory that they need.

    ``asked``, or else 32 on a CPU and 256 on a GPU, or fewer if half of the free memory is less: a power of two then.
    ``size`` is the images' height and width in pixels, ``kept`` the images that are kept in memory for each of them
    (``DecideOptions.images_kept``), ``trainer`` the further arguments of the Trainer. At least 1, at most ``count``.
    ValueError for the native engine on a GPU.
    """
    if fit.engine == "native" and device.type != "cpu":
        raise ValueError(f"`engine` 'native' cannot be used here: it runs on a CPU, got a fit on {device.type}")
    wanted = min(count, asked or SIZES["cuda" if device.type == "cuda" else "cpu"])
    if (free_bytes := free_memory(device)) is None:
        return wanted
    with isolated_trainer(device):
        precision = trainer_precision(trainer)
        engine = engine_on_cpu(fit, size, min(T, SHORT), precision) if device.type == "cpu" else fit.engine
        wide = replace(fit, dtype="float64") if precision == "64-true" else fit
        shared, each = memory_need(size, fit=wide, kept=kept, engine=engine)
    bound = int(OURS * free_bytes - shared) // each
    host = free_memory(torch.device("cpu")) if device.type == "cuda" else None
    if host is not None:  # what is kept comes to lie there
        image_bytes = 3 * size[0] * size[1] * getattr(torch, wide.dtype).itemsize
        bound = min(bound, int(OURS * host) // (max(1, kept) * image_bytes))
    taken = wanted if asked or bound >= wanted else 2 ** int(math.log2(max(1, bound)))
    gib = (shared + taken * each) / 2**30
    images = f"{taken} image{'s' * (taken > 1)} of {size[0]}x{size[1]} pixels"
    say_once(f"fits of {images} at once need {gib:.2f} GiB", level=logging.INFO)
    return taken


def engine_on_cpu(fit: FitOptions, size: tuple[int, int], T: int, precision: str) -> str:
    """The engine of a fit of T steps to images of this height and width on the CPU; may compile the native one.

    ``precision`` is the Trainer's: mixed precision is torch's alone.
    """
    if "mixed" in precision and fit.engine == "auto":
        return "torch"
    with isolated_trainer(torch.device("cpu")):
        module = StackedDIP(torch.full((1, 3, *size), 0.5, dtype=torch.float32, device="cpu"), options=fit)
        how: dict[str, Any] = {"z_gradient": fit.optimise_z, "matmul_precision": fit.matmul_precision}
        return make_engine(fit.engine, module.net, module.given, steps=T, **how).name
