"""An image's index, which with the seed settles its random draws, where nobody hands one over."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

DRAWS = ("content", "position", "fresh")
"""How `IndexRule` finds indices."""

_FRESH = 2**32  # no data set is so large: a fresh index is no image's position


class IndexRule:
    """Indices of images that come without any.

    ``content``: a hash of the image's pixels. The same image gets the same draws, in whatever batch or process it comes
    (the way to be independent of the batch size that needs no bookkeeping), any other image has draws of its own.
    ``position``: the position in the batch, so that the same place has the same draws at each call. ``fresh``: no index
    comes twice, so that the system answers the same image anew each time.

    Args:
        draws: One of `DRAWS`.
    """

    def __init__(self, draws: str) -> None:
        self.draws = draws
        self._given = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Indices int64 [N], on the CPU, of images [N, 3, H, W]."""
        count = len(images)
        if self.draws == "content":
            return content_indices(images)
        if self.draws == "position":
            return torch.arange(count)
        self._given += count
        return torch.arange(self._given - count, self._given) + _FRESH


def content_indices(images: Tensor) -> Tensor:
    """Hash each image [3, H, W] of a batch to an index int64 [N] of 63 bits (SHA-256 of its float32 values)."""
    values = images.detach().float().cpu().contiguous().numpy()
    digests = (hashlib.sha256(image.tobytes()).digest() for image in values)
    return torch.tensor([int.from_bytes(digest[:8], "big") >> 1 for digest in digests], dtype=torch.int64)


class LoaderPositions:
    """Counts the images of a data loader; says where in the data set each stands.

    The k-th image that a process loads stands at k; where a `DistributedSampler` shares the data out among R processes,
    process r's k-th image stands at k R + r. Neither batch size nor number of processes plays a role, as long as the
    loader is in the data set's order (Lightning's loaders for test, validate and predict are, unless shuffled).

    Args:
        loader: A data loader, or anything else that is iterated over: its images are then only counted.
    """

    def __init__(self, loader: Any) -> None:
        batches = getattr(loader, "batch_sampler", None)
        sampler = getattr(batches, "sampler", None) or getattr(loader, "sampler", None)
        self._sampler = sampler if isinstance(sampler, DistributedSampler) else None
        self._seen = 0

    def next(self, count: int) -> tuple[Tensor, Tensor]:
        """Positions int64 [count] of the next images, and whether each is a repeat, bool [count].

        Repeats are the images that a `DistributedSampler` gives out twice, so that all processes get as many.
        """
        order = torch.arange(self._seen, self._seen + count)
        self._seen += count
        sampler = self._sampler
        if sampler is None:
            return order, torch.zeros(count, dtype=torch.bool)
        order = order * sampler.num_replicas + sampler.rank
        size = len(sampler.dataset)  # type: ignore[arg-type]
        return order % size, order >= size
