"""The precision of matrix products and convolutions on a GPU: float32, TF32 or bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dipguard.checks import check_choice

PRECISIONS = ("float32", "tf32", "bfloat16")


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Multiply in the given precision inside the context; torch's switches are restored afterwards.

    Forward and backward pass must both run inside, or be captured there. On a CPU ``float32`` and ``tf32`` are the
    same.

    Args:
        name: ``float32``: exact float32, unlike torch's default on a GPU, where convolutions use TF32. ``tf32``:
            factors are rounded to 10 bits of mantissa, sums stay in float32. ``bfloat16``: torch's autocast; weights
            and optimiser stay in float32. The last two change results, DIP reconstructions visibly; their effect on
            defended accuracy has not been checked.
        device: Where the work runs.

    Raises:
        ValueError: Unknown name.
    """
    check_choice(name, PRECISIONS, name="matmul_precision")
    # Each weight is used once per step: a cache of cast weights would only have to be kept out of CUDA graphs.
    cast = torch.autocast(device.type, torch.bfloat16, enabled=name == "bfloat16", cache_enabled=False)
    with _float32_products("tf32" if name == "tf32" else "ieee"), cast:
        yield


@contextmanager
def _float32_products(kind: str) -> Iterator[None]:
    # Torch has an old and a new set of switches for one state, and reading an old one raises an error where the new
    # ones hold a state that the old cannot express. So the old ones are set too, if they can be read at the start.
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    new: list[Any] = [matmul, cudnn.conv, cudnn.rnn]  # type: ignore[attr-defined, unused-ignore]
    before = [switch.fp32_precision for switch in new]
    try:
        old = matmul.allow_tf32, cudnn.allow_tf32
    except RuntimeError:
        old = None
    try:
        if old is not None:
            matmul.allow_tf32 = cudnn.allow_tf32 = kind == "tf32"
        for switch in new:
            switch.fp32_precision = kind
        yield
    finally:
        if old is not None:
            matmul.allow_tf32, cudnn.allow_tf32 = old
        for switch, value in zip(new, before, strict=True):
            switch.fp32_precision = value
