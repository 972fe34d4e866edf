"""Stacks of untrained U-Nets."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dipguard.networks.layers import INITS, PADDINGS
from dipguard.networks.presets import PRESETS, NetworkSpec, resolve
from dipguard.networks.unet import StackedSkipNet
from dipguard.seeding import image_generator

__all__ = ["INITS", "PADDINGS", "PRESETS", "NetworkSpec", "StackedSkipNet", "build", "resolve"]


def build(
    network: str | NetworkSpec,
    *,
    stack_size: int,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    init: str = "default",
    padding: str = "reflect",
    dtype: torch.dtype = torch.float32,
) -> StackedSkipNet:
    """A stack of B initialised networks.

    Args:
        network: A preset of appendix B (cifar10, imagenet, small, medium, large), or a spec of one's own.
        stack_size: B, at least 1.
        seed: The configuration's seed.
        indices: The images' indices in their data set, B of them; 0 ... B-1 by default. Network b's weights depend on
            (seed, indices[b]) alone.
        init: ``default`` or ``xavier``.
        padding: ``zeros`` or ``reflect``.
        dtype: float32 or float64; both start from the same float32 draws.

    Raises:
        ValueError: An option is out of range, or not as many indices as networks.
    """
    stack = StackedSkipNet(resolve(network), stack_size=stack_size, padding=padding).to(dtype)
    order = list(range(stack_size)) if indices is None else list(indices)
    if len(order) != stack_size:
        raise ValueError(f"`indices` must hold stack_size={stack_size} numbers, got {len(order)}")
    for b, index in enumerate(order):
        stack.init_one(b, generator=image_generator(seed=seed, index=index, purpose="weights"), init=init)
    return stack
