"""Which noise on z a fit gets: drawn as it is needed, or ahead by threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from dipguard.engines.jitter_feed import JitterFeed
from dipguard.fit.noise import Jitter

JitterSource: TypeAlias = Jitter | JitterFeed


def jitter_source(
    shape: tuple[int, int, int], *, indices: Sequence[int], seed: int, std: float, engine: str, device: torch.device
) -> JitterSource | None:
    """The jitter of some images from their first step on; None where there is none.

    Args:
        shape: (channels, H, W) of z.
        indices: The images' indices.
        seed: The configuration's seed.
        std: Standard deviation.
        engine: Name of the engine that computes the steps.
        device: Where z is.
    """
    if std == 0:
        return None
    # A graph's step is over before one thread has drawn its noise; elsewhere the feed's threads gain nothing.
    if engine == "cuda_graph":
        return JitterFeed(shape, indices=indices, seed=seed, std=std, device=device)
    return Jitter(shape, indices=indices, seed=seed, std=std)
