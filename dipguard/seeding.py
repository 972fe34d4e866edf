"""Random streams that belong to one image: they depend on (seed, index, purpose) and on nothing else."""

from __future__ import annotations

import hashlib

import torch


def image_generator(*, seed: int, index: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose of one image.

    The three are hashed, so that neighbouring seeds or indices do not give related streams. The generator is on the
    CPU, whatever the device of the fit is: the same image then gets the same draws everywhere.

    Args:
        seed: The configuration's seed.
        index: The image's index in its data set.
        purpose: What is drawn, such as ``weights``, ``z`` or ``jitter``; each has a stream of its own, so that
            turning one off does not move the others.
    """
    digest = hashlib.sha256(f"{seed}:{index}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
