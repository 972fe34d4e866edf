"""Random streams per image: they depend on (seed, index, purpose), and on no other image, stack, T or device.

The random states of the whole process stay as they are.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning_fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor

BLOCK = 8
"""Steps of jitter drawn at once: fixed, since the numbers depend on it."""


def image_generator(*, seed: int, index: int, purpose: str) -> torch.Generator:
    """Return a generator for one purpose of one image, on the CPU, so that draws do not depend on the fit's device.

    ``index`` is the image's place in its data set. Each ``purpose``, a word such as ``weights`` or ``z``, has a stream
    of its own: turning one off does not change the others. The arguments are hashed, so that neighbouring seeds or
    indices do not give related streams.
    """
    digest = hashlib.sha256(f"{seed}:{index}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def further_index(index: int, number: int) -> int:
    """Return an index of 63 bits that gives an image other draws, a different one for each ``number``."""
    digest = hashlib.sha256(f"{index}:look:{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw_z(
    shape: tuple[int, int, int], *, indices: Sequence[int], seed: int, kind: str = "uniform", scale: float
) -> Tensor:
    """z of each image, [B, channels, H, W] float32 on the CPU.

    ``uniform`` draws from U(0, scale) (appendix B), ``gaussian`` from scale * N(0, 1) (section 3.1 calls z a Gaussian
    noise). ``shape`` is (channels, H, W).
    """
    z = torch.empty(len(indices), *shape, dtype=torch.float32, device="cpu")
    for b, index in enumerate(indices):
        generator = image_generator(seed=seed, index=index, purpose="z")
        if kind == "uniform":
            z[b].uniform_(0, scale, generator=generator)
        else:
            z[b].normal_(0, scale, generator=generator)
    return z


class Jitter:
    """Gaussian noise added to z at each step, as the official DIP implementation does for denoising.

    ``shape`` is (channels, H, W) of z; the noise of image b depends only on (``seed``, ``indices[b]``, step) and has
    the standard deviation ``std``, at least 0.
    """

    def __init__(self, shape: tuple[int, int, int], *, indices: Sequence[int], seed: int, std: float) -> None:
        self.std = std
        self._generators = [image_generator(seed=seed, index=index, purpose="jitter") for index in indices]
        with torch.inference_mode(False):
            self._block = self._ready = torch.empty(len(indices), BLOCK, *shape, dtype=torch.float32, device="cpu")
        self._position = BLOCK

    def next(self, z: Tensor) -> Tensor:
        """Z plus the noise of the next step, [B, channels, H, W] of z's dtype and device."""
        if self._position == BLOCK:
            self._ready = self._next_block(z)
            self._position = 0
        noise = self._ready[:, self._position]
        self._position += 1
        return torch.add(z, noise, alpha=self.std)

    def _next_block(self, z: Tensor) -> Tensor:
        for b, generator in enumerate(self._generators):
            self._block[b].normal_(generator=generator)
        return self._block.to(device=z.device, dtype=z.dtype)


@contextmanager
def kept_rng() -> Iterator[None]:
    """Put back the random states of Python, NumPy and torch: after an error too, unlike Lightning's ``isolate_rng``.

    Only in the main thread: they are the whole process's, so another thread would make the main one's draws come twice.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    states = _collect_rng_states(include_cuda=torch.cuda.is_initialized())
    try:
        yield
    finally:
        _set_rng_states(states)
