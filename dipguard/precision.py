"""The precision of products: torch's switches for it, set and put back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
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


def widest(device: torch.device) -> torch.dtype:
    """float64; float32 on a device of Apple's, which lacks it."""
    return torch.float32 if device.type == "mps" else torch.float64


class ProcessWide:
    """Contexts that change the whole process: of several threads inside, the first enters them, the last leaves."""

    def __init__(self) -> None:
        self._lock, self._inside, self._state = threading.Lock(), 0, ExitStack()

    @contextmanager
    def inside(self, *make: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """Be inside; the contexts are made by ``make``, and entered in its order."""
        with self._lock:
            if self._inside == 0:
                with ExitStack() as entered:  # left again if one cannot be entered
                    for one in make:
                        entered.enter_context(one())
                    self._state = entered.pop_all()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._state.close()


_exact = ProcessWide()


def exact_products() -> AbstractContextManager[None]:
    """Multiply float32 exactly in the whole process, and let cuDNN add in a fixed order."""
    return _exact.inside(partial(_switches, "ieee"))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """`exact_products`, and on a device of this type no autocast of the caller's."""
    with exact_products(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def _switches(kind: str) -> Iterator[None]:
    """Float32 products in ``tf32`` or exact (``ieee``), on a CPU exact, and sums of cuDNN in a fixed order."""
    # Torch has an old and a new set of switches for one state, and reading an old one, as Lightning does, raises an
    # error where the new ones hold a state that the old cannot express. So the old ones are set too, if they can be
    # read at the start.
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    on_gpu: list[Any] = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]  # type: ignore[attr-defined, unused-ignore]
    new: list[Any] = [*on_gpu, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]  # type: ignore[attr-defined, unused-ignore]
    before, order = [switch.fp32_precision for switch in new], (cudnn.deterministic, cudnn.benchmark)
    products = convolutions = None
    with suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        convolutions = cudnn.allow_tf32
    try:
        if products is not None:
            torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
        if convolutions is not None:
            cudnn.allow_tf32 = kind == "tf32"
        for switch in new:
            switch.fp32_precision = kind if switch in on_gpu else "ieee"
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = order
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            cudnn.allow_tf32 = convolutions
        for switch, value in zip(new, before, strict=True):
            switch.fp32_precision = value
