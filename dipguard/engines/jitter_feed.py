"""The jitter of :mod:`dipguard.fit.noise` for a GPU: drawn ahead on the CPU, copied without anybody waiting.

The noise of an image must depend on (seed, index, step) alone, whatever the device, so it is drawn on the CPU, by the
same generators in the same blocks. For a stack of 512 images of 32x32 that is 17 million normal numbers for every eight
steps, a tenth of a second on one core: several threads draw the next block while the GPU works on the current one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from dipguard.checks import check_float
from dipguard.seeding import image_generator

BLOCK = 8
"""Steps drawn at once: as in :mod:`dipguard.fit.noise`, since an image's numbers depend on it."""
MAX_WORKERS = 8


class JitterFeed:
    """Gaussian noise for z: the same numbers as :class:`dipguard.fit.noise.Jitter`.

    Two blocks lie on the device, one in use and one on its way, and two in page-locked memory: 128 KiB an image of
    32x32 and input depth 4 for each of the four.

    Args:
        shape: (channels, H, W) of z.
        indices: The images' indices; image b's noise depends on (seed, indices[b], step) alone.
        seed: The configuration's seed.
        std: Standard deviation, at least 0.
        device: Where z is.
    """

    def __init__(
        self, shape: tuple[int, int, int], *, indices: Sequence[int], seed: int, std: float, device: torch.device
    ) -> None:
        self.std = check_float(std, name="jitter", low=0.0)
        self._device = device
        self._shape = shape
        self._generators = [image_generator(seed=seed, index=index, purpose="jitter") for index in indices]
        self._workers = max(1, min(MAX_WORKERS, _granted_cores() - 1))
        self._threads = ThreadPoolExecutor(self._workers, "dipguard-jitter")
        self._coming: list[Future[None]] = []
        self._current = self._sent = -1  # blocks, by number
        self._position = BLOCK
        self._make_room()
        self._draw(0)

    def next(self, z: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Z plus the noise of the next step, [B, channels, H, W]; written to ``out`` if given."""
        if self._position == BLOCK:
            self._advance()
        elif self._sent == self._current and all(part.done() for part in self._coming):
            self._send()
        noise = self._ready[self._current % 2][:, self._position]
        self._position += 1
        if out is None:
            return torch.add(z, noise, alpha=self.std)
        return torch.add(z, noise, alpha=self.std, out=out)

    def keep(self, rows: list[int]) -> None:
        """Go on with these images' streams alone, in this order; waits for the threads."""
        for part in self._coming:
            part.result()
        if self._transfer is not None:
            self._transfer.stream.synchronize()
        drawn, ready = self._drawn, self._ready
        self._generators = [self._generators[b] for b in rows]
        self._make_room()
        for new, old in zip([*self._drawn, *self._ready], [*drawn, *ready], strict=True):
            new.copy_(old[rows])
        if self._transfer is not None:
            self._transfer.wait_for_the_fit()

    def close(self) -> None:
        """Stop the threads; what they have drawn and nobody has used is thrown away."""
        self._threads.shutdown(cancel_futures=True)

    def _make_room(self) -> None:
        size = (len(self._generators), BLOCK, *self._shape)
        cuda = self._device.type == "cuda"
        with torch.inference_mode(False):
            self._drawn = [torch.empty(size, pin_memory=cuda) for _ in range(2)]
            self._ready = [torch.empty(size, device=self._device) for _ in range(2)]
        self._transfer = _Transfer(self._ready, self._device) if cuda else None

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
        self._coming = [
            self._threads.submit(self._fill, number % 2, range(part, count, parts)) for part in range(parts)
        ]

    def _fill(self, slot: int, images: range) -> None:
        if self._transfer is not None:
            self._transfer.copied[slot].synchronize()  # only this thread waits until the last block has left its place
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
        # An event that was never recorded holds nobody up.
        self.copied = [torch.cuda.Event() for _ in targets]
        self.used = [torch.cuda.Event() for _ in targets]

    def copy(self, block: Tensor, slot: int) -> None:
        """Queue a copy, once nobody reads what lies there."""
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.used[slot])
            self.targets[slot].copy_(block, non_blocking=True)
            self.copied[slot].record(self.stream)

    def wait_for_the_fit(self) -> None:
        """Let no copy begin before what the fit has queued so far."""
        for event in self.used:
            event.record(torch.cuda.current_stream(self.device))

    def hand_over(self, finished: int, begun: int) -> None:
        """What the fit queues from now on reads ``begun``, and no more ``finished``."""
        stream = torch.cuda.current_stream(self.device)
        self.used[finished].record(stream)
        stream.wait_event(self.copied[begun])


def _granted_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
