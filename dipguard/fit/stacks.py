"""Many images, one stack after the other; where memory runs out, in smaller stacks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from dipguard.fit.out_of_memory import free, is_out_of_memory
from dipguard.fit.progress import FitProgress, progress_bar

_log = logging.getLogger(__name__)
Result = TypeVar("Result")
Work = Callable[[slice, int, FitProgress], Result]
"""Fits a slice of the images: called with the first step's number in the log, and a callback for the Trainer."""


def in_stacks(
    count: int,
    *,
    size: int,
    T: int,
    work: Work[Result],
    device: torch.device,
    progress: bool,
    rounds: int = 1,
) -> Iterator[Result]:
    """The results of ``work`` on one stack of images after the other.

    Where memory runs out, the stack is halved and begun again; later ones stay as small. One warning says so.

    Args:
        count: Number of images.
        size: Images a stack, at least 1.
        T: Steps a stack.
        work: See :data:`Work`.
        device: Where it runs.
        progress: Show a progress bar.
        rounds: Images handed to ``work``, in stacks; above 1, it refills its stack of ``progress.slots`` from them.

    Raises:
        torch.OutOfMemoryError, MemoryError, RuntimeError: A single image is too much; the message names remedies.
    """
    first = calls = 0
    warn = True
    with progress_bar(images=count, T=T, show=progress) as bar:
        while first < count:
            part = slice(first, min(first + size * rounds, count))
            images = min(size, part.stop - part.start)
            # A refilled stack that nobody leaves early takes T steps a round, and idle places a little more.
            results, problem = _attempt(work, part, calls * T * (2 * rounds - 1), bar, slots=images)
            calls += 1
            if problem is None:
                yield results[0]
                first = part.stop
                continue
            size = (images + 1) // 2
            text = f"out of memory with {images} images at once; going on with {size} (`stack_size`): {problem}"
            if warn:
                warnings.warn(text, UserWarning, stacklevel=3)
            else:
                _log.warning("%s", text)
            warn = False
            free(device)


def _attempt(
    work: Work[Result], part: slice, first_step: int, bar: tqdm[Any], *, slots: int
) -> tuple[list[Result], str | None]:
    """The result, or what the error said: the error itself would hold the memory of the failed fit."""
    progress = FitProgress(bar, images=part.stop - part.start, slots=slots)
    try:
        return [work(part, first_step, progress)], None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        progress.roll_back()
        if slots > 1:
            return [], (str(error).splitlines() or ["no memory"])[0]
        kind = next(k for k in (torch.OutOfMemoryError, MemoryError, RuntimeError) if isinstance(error, k))
        raise kind(
            "a single image at a time is too much for the memory: free some, or take smaller images, a smaller "
            f"`network`, a smaller `K_max` or `keep_samples`=False ({error})"
        ) from error
