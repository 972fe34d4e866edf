"""The jitter on z for a GPU: drawn ahead on the CPU and copied without blocking the fit.

For 512 images of 32x32 a block is 17 million normal numbers, a tenth of a second on one core: several threads draw the
next block while the GPU works on this one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from dipguard.checks import check_float
from dipguard.seeding import BLOCK, image_generator

MAX_WORKERS = 8


class JitterFeed:
    """Gaussian noise for z: the arguments and the numbers of :class:`dipguard.seeding.Jitter`, for a z on ``device``.

    Two blocks lie on the device, one in use and one arriving, and two in page-locked memory: 128 KiB per image and
    block for 32x32 pixels and input depth 4.
    """

    def __init__(
        self, shape: tuple[int, int, int], *, indices: Sequence[int], seed: int, std: float, device: torch.device
    ) -> None:
        self.std = check_float(std, name="jitter", low=0.0)
        self._generators = [image_generator(seed=seed, index=index, purpose="jitter") for index in indices]
        granted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        self._workers = max(1, min(MAX_WORKERS, granted - 1))
        self._threads = ThreadPoolExecutor(self._workers, "dipguard-jitter")
        self._coming: list[Future[None]] = []
        self._current = self._sent = -1  # block numbers
        self._position = BLOCK
        size, cuda = (len(indices), BLOCK, *shape), device.type == "cuda"
        with torch.inference_mode(False):
            self._drawn = [torch.empty(size, dtype=torch.float32, pin_memory=cuda) for _ in range(2)]
            self._ready = [torch.empty(size, dtype=torch.float32, device=device) for _ in range(2)]
        self._transfer = _Transfer(self._ready, device) if cuda else None
        self._draw(0)

    def next(self, z: Tensor) -> Tensor:
        """Z plus the noise of the next step, [B, channels, H, W]."""
        if self._position == BLOCK:
            self._advance()
        elif self._sent == self._current and all(part.done() for part in self._coming):
            self._send()
        noise = self._ready[self._current % 2][:, self._position]
        self._position += 1
        return torch.add(z, noise, alpha=self.std)

    def close(self) -> None:
        """Stop the threads and discard what they have drawn ahead."""
        self._threads.shutdown(cancel_futures=True)

    def _advance(self) -> None:
        if self._sent == self._current:
            self._send()  # the threads are behind: wait for them
        if self._transfer is not None:
            self._transfer.hand_over(self._current % 2, self._sent % 2)
        self._current = self._sent
        self._position = 0

    def _send(self) -> None:
        for part in self._coming:
            part.result()
        self._sent += 1
        slot = self._sent % 2
        if self._transfer is None:
            self._ready[slot].copy_(self._drawn[slot])
        else:
            self._transfer.copy(self._drawn[slot], slot)
        self._draw(self._sent + 1)

    def _draw(self, number: int) -> None:
        count = len(self._generators)
        parts = min(self._workers, count)
        shares = [range(part, count, parts) for part in range(parts)]
        self._coming = [self._threads.submit(self._fill, number % 2, share) for share in shares]

    def _fill(self, slot: int, images: range) -> None:
        if self._transfer is not None:
            self._transfer.copied[slot].synchronize()  # only this thread waits until the previous block is copied
        block = self._drawn[slot]
        for b in images:
            block[b].normal_(generator=self._generators[b])


class _Transfer:
    """Copies blocks to the GPU on a stream of its own, beside the fit's."""

    def __init__(self, targets: list[Tensor], device: torch.device) -> None:
        self.targets = targets
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        for target in targets:
            target.record_stream(self.stream)
        # Waiting for an event that was never recorded returns at once.
        self.copied = [torch.cuda.Event() for _ in targets]
        self.used = [torch.cuda.Event() for _ in targets]

    def copy(self, block: Tensor, slot: int) -> None:
        """Queue a copy that starts when the block in its place is no longer used."""
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.used[slot])
            self.targets[slot].copy_(block, non_blocking=True)
            self.copied[slot].record(self.stream)

    def hand_over(self, finished: int, begun: int) -> None:
        """From now on the fit reads ``begun`` and no longer ``finished``."""
        stream = torch.cuda.current_stream(self.device)
        self.used[finished].record(stream)
        stream.wait_event(self.copied[begun])
