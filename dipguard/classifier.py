"""Somebody's classifier: used without being changed, its output checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def eval_mode(classifier: nn.Module) -> Iterator[nn.Module]:
    """Hold a classifier in eval mode, and put every part back in its own mode afterwards.

    Modes are kept part by part: a fine-tuned classifier may have some of its BatchNorms frozen.
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
    """Hold a classifier in eval mode with no parameter requiring a gradient; put every flag back afterwards."""
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
    """The device of the first parameter or buffer; ``default`` (or the CPU) where there is neither."""
    for tensor in chain(classifier.parameters(), classifier.buffers()):
        return tensor.device
    return default or torch.device("cpu")


def check_is_module(classifier: Any, *, name: str = "victim") -> nn.Module:
    """Return ``classifier`` if it is a module.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(classifier, nn.Module):
        raise TypeError(f"`{name}` must be a torch.nn.Module, got {type(classifier).__name__}")
    return classifier


def check_logits(output: Any, *, count: int, name: str = "victim") -> Tensor:
    """Return a classifier's output if it can be logits [B, C] of ``count`` images.

    Raises:
        TypeError: It is no floating-point tensor.
        ValueError: It is not [count, C] with C of at least 2.
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
    """A warning's text if rows look like probabilities (all in [0, 1], each row's sum 1), None otherwise."""
    low, high = torch.aminmax(logits)
    if low < 0 or high > 1 or bool(((logits.sum(dim=1) - 1).abs() >= 1e-3).any()):
        return None
    return (
        f"`{name}` must return logits, but its outputs lie in [0, 1] and sum to 1, as probabilities do: attacks would "
        "be weaker than they should be, and Eq. 5 would compare something else; drop the softmax"
    )
