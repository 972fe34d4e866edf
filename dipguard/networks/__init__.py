"""Stacks of untrained U-Nets."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dipguard.networks.presets import PRESETS, NetworkSpec, network_spec
from dipguard.networks.unet import INITS, PADDINGS, StackedSkipNet
from dipguard.seeding import image_generator

__all__ = ["INITS", "PADDINGS", "PRESETS", "NetworkSpec", "StackedSkipNet", "build", "network_spec"]


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
        network: A preset of appendix B (``cifar10``, ``imagenet``, ``small``, ``medium``, ``large``), or a spec.
        stack_size: B, at least 1.
        seed: The configuration's seed.
        indices: The images' B indices in their data set; 0 ... B-1 by default. The weights of network b depend only on
            (seed, indices[b]).
        init: ``default`` (PyTorch's for convolutions) or ``xavier``.
        padding: ``zeros`` or ``reflect``.
        dtype: float32 or float64; both start from the same float32 draws.

    Raises:
        ValueError: An option is out of range, or the number of indices is not B.
    """
    stack = StackedSkipNet(network_spec(network), stack_size=stack_size, padding=padding).to(dtype)
    order = list(range(stack_size)) if indices is None else list(indices)
    if len(order) != stack_size:
        raise ValueError(f"`indices` must hold stack_size={stack_size} numbers, got {len(order)}")
    for b, index in enumerate(order):
        stack.init_one(b, generator=image_generator(seed=seed, index=index, purpose="weights"), init=init)
    return stack
