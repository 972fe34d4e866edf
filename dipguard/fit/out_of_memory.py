"""What it looks like when memory has run out."""

from __future__ import annotations

import gc

import torch

from dipguard.fit.memory import trim

TOLD = (
    "DefaultCPUAllocator",  # torch's on a CPU
    "could not create a primitive",  # oneDNN's convolutions say no more than that
    "not enough memory",
    "Cannot allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""How errors of other kinds than torch.OutOfMemoryError say it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in TOLD)


def free(device: torch.device) -> None:
    """Give back what nobody holds any more. A Trainer and its module hold each other, hence the collector."""
    gc.collect()
    trim(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
