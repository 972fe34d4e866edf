"""Random streams per image: they depend on (seed, index, purpose) and on nothing else."""

from __future__ import annotations

import hashlib

import torch


def image_generator(*, seed: int, index: int, purpose: str) -> torch.Generator:
    """Return a CPU generator for one purpose of one image.

    The arguments are hashed, so that neighbouring seeds or indices do not give related streams. The generator is always
    on the CPU, so that draws do not depend on the device of the fit.

    Args:
        seed: Seed of the run.
        index: Index of the image in its data set.
        purpose: What is drawn, such as ``weights``, ``z`` or ``jitter``. Each purpose has its own stream, so that
            turning one off does not change the others.
    """
    digest = hashlib.sha256(f"{seed}:{index}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
