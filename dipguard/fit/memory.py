"""Keeps the memory that one step of a CPU fit frees for the next step."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's numbers for them
KEEP = 2**31 - 1
# What the C library's own adaptation arrives at, at most, in a program that handles large blocks.
ADAPTED_MMAP, ADAPTED_TRIM = 32 * 2**20, 64 * 2**20


@contextmanager
def kept_memory(device: torch.device) -> Iterator[bool]:
    """Let the C library hold on to freed blocks while a fit runs on the CPU; give them back at the end.

    A step of 32 images allocates and frees some hundred megabytes in blocks of a few. The C library hands such blocks
    back to the system at once, which then maps and clears every page anew: some 10,000 page faults a step, a tenth to
    a fifth of the fit's time (benchmarks/README.md). Only glibc has the switch; elsewhere, and on a GPU, nothing is
    done. The switch is the whole process's; afterwards it stands where glibc's own adaptation would have put it.

    Yields:
        Whether memory is kept.
    """
    libc = _glibc(device)
    if libc is None:
        yield False
        return
    libc.mallopt(M_MMAP_THRESHOLD, KEEP)
    libc.mallopt(M_TRIM_THRESHOLD, KEEP)
    try:
        yield True
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, ADAPTED_MMAP)
        libc.mallopt(M_TRIM_THRESHOLD, ADAPTED_TRIM)
        libc.malloc_trim(0)


def trim(device: torch.device) -> None:
    """Hand the blocks that a CPU fit has freed back to the system, where that can be done."""
    libc = _glibc(device)
    if libc is not None:
        libc.malloc_trim(0)


def _glibc(device: torch.device) -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" and device.type == "cpu" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
