"""The precision of products: torch's switches for it, set and put back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from dipguard.checks import check_choice

PRECISIONS = ("float32", "tf32", "bfloat16")


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Multiply in the given precision inside the context; torch's switches are restored afterwards.

    Forward and backward pass must both run inside, or be captured there. ``float32`` is exact, unlike torch's default
    on a GPU, where convolutions use TF32. ``tf32`` rounds factors to 10 bits of mantissa and sums in float32; on a CPU
    it is float32. ``bfloat16`` is torch's autocast; weights and optimiser stay in float32. The last two change results,
    DIP reconstructions visibly; their effect on defended accuracy has not been checked. ValueError for other names.
    """
    check_choice(name, PRECISIONS, name="matmul_precision")
    # Each weight is used once per step: a cache of cast weights would only have to be kept out of CUDA graphs.
    cast = torch.autocast(device.type, torch.bfloat16, enabled=name == "bfloat16", cache_enabled=False)
    with _switches("tf32" if name == "tf32" else "ieee"), cast:
        yield


_lock = threading.Lock()
_inside = 0
_state = ExitStack()


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 exactly in the whole process, and let cuDNN add in a fixed order.

    Of several threads that are inside, the first one sets torch's switches and the last one restores them.
    """
    global _inside
    with _lock:
        if _inside == 0:
            _state.enter_context(_switches("ieee"))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _state.close()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """`exact_products`, and on a device of this type no autocast of the caller's."""
    with exact_products(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def _switches(kind: str) -> Iterator[None]:
    """Float32 products in ``tf32`` or exact (``ieee``), and sums of cuDNN in a fixed order."""
    # Torch has an old and a new set of switches for one state, and reading an old one raises an error where the new
    # ones hold a state that the old cannot express. So the old ones are set too, if they can be read at the start.
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    new: list[Any] = [matmul, cudnn.conv, cudnn.rnn]  # type: ignore[attr-defined, unused-ignore]
    before, order = [switch.fp32_precision for switch in new], (cudnn.deterministic, cudnn.benchmark)
    try:
        old = matmul.allow_tf32, cudnn.allow_tf32
    except RuntimeError:
        old = None
    try:
        if old is not None:
            matmul.allow_tf32 = cudnn.allow_tf32 = kind == "tf32"
        for switch in new:
            switch.fp32_precision = kind
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = order
        if old is not None:
            matmul.allow_tf32, cudnn.allow_tf32 = old
        for switch, value in zip(new, before, strict=True):
            switch.fp32_precision = value
