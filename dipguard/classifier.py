"""Use any classifier without changing it, and check its output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def eval_mode(classifier: nn.Module) -> Iterator[nn.Module]:
    """Put a classifier in eval mode, and restore the mode of every submodule afterwards.

    Modes are saved per submodule, since some BatchNorm layers of a fine-tuned classifier may be frozen.
    """
    modes = [(part, part.training) for part in classifier.modules()]
    classifier.eval()
    try:
        yield classifier
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def frozen(classifier: nn.Module) -> Iterator[nn.Module]:
    """Put a classifier in eval mode without parameter gradients; restore modes and flags afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in classifier.parameters()]
    with eval_mode(classifier):
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield classifier
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def device_of(classifier: nn.Module, default: torch.device | None = None) -> torch.device:
    """Return the device of the first parameter or buffer; ``default`` (or the CPU) if there is none."""
    for tensor in chain(classifier.parameters(), classifier.buffers()):
        return tensor.device
    return default or torch.device("cpu")


def check_is_module(classifier: Any, *, name: str = "victim") -> nn.Module:
    """Return ``classifier`` if it is a module.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(classifier, nn.Module):
        raise TypeError(f"`{name}` must be a torch.nn.Module, got {type(classifier).__name__}")
    return classifier


def check_logits(output: Any, *, count: int, name: str = "victim") -> Tensor:
    """Return a classifier's output if it has the type and shape of logits for ``count`` images.

    Raises:
        TypeError: It is not a floating-point tensor.
        ValueError: Its shape is not [count, C] with C >= 2.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"`{name}` must return a floating-point tensor [B, C] of logits, got {kind}")
    if output.ndim != 2 or len(output) != count or output.shape[1] < 2:
        raise ValueError(
            f"`{name}` must return logits [B, C] with C of at least 2, got shape {tuple(output.shape)} for {count} "
            "images"
        )
    return output


def probability_warning(logits: Tensor, *, name: str = "victim") -> str | None:
    """Return a warning text if the rows look like probabilities (in [0, 1], each summing to 1), else None."""
    low, high = torch.aminmax(logits)
    if low < 0 or high > 1 or bool(((logits.sum(dim=1) - 1).abs() >= 1e-3).any()):
        return None
    return (
        f"`{name}` must return logits, but its outputs lie in [0, 1] and sum to 1, as probabilities do: attacks would "
        "be weaker than they should be, and Eq. 5 would compare something else; drop the softmax"
    )
