"""HopSkipJump's walk along the decision boundary for one image (Chen, Jordan and Wainwright, 2020, Algorithm 2).

It is written as a generator: it yields the images that it wants to ask about and is sent the answers. So the walks of
many images can be asked about together (one stacked fit of a DIP defence, not one an image), and whoever asks counts,
and stops the walk when the budget is spent.

The libraries' versions were no help here: ART's (1.20.1) walks image by image, draws its start from an unseeded
generator and repeats its step search for as long as it fails, which on a random defence may be for ever; foolbox's
(3.3.4) asks about the gradient's probes one by one and stops with an AssertionError when an answer changes. Constants
and thresholds are those of ART, which the paper used (appendix A); the tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from functools import partial
from itertools import count
from typing import TypeVar

import torch
from torch import Tensor

NORMS = ("Linf", "L2")

_T = TypeVar("_T")
Walk = Generator[Tensor, Tensor, _T]
"""Yields images [n, 3, H, W] in [0, 1], is sent bool [n] on the CPU: which of them are adversarial."""

_HALVINGS = 30  # of the step; an answer that never repeats itself would ask for more without end


def walk(
    image: Tensor, generator: torch.Generator, *, norm: str, init_size: int = 100, init_eval: int = 100
) -> Walk[None]:
    """Walk from noise towards ``image`` along the boundary, without end; every round asks at least one question.

    Args:
        image: [3, H, W] in [0, 1], read rightly; on the CPU, like all that is yielded.
        generator: of the image's draws.
        norm: ``Linf`` or ``L2``, the distance that is to fall.
        init_size: noise images that are tried as a start before the walk gives up.
        init_eval: probes of the first round's gradient; round t has sqrt(t) times as many, at most 10,000.
    """
    current = yield from _start(image, generator, init_size)
    if current is None:
        return
    for number in count(1):
        distance = length(current - image, norm)
        # The first round probes 0.1 around, as the authors' own code does.
        radius = 0.1 if number == 1 else 0.01 * distance
        current = yield from _to_boundary(image, current, norm)
        if length(current - image, norm) == 0:
            return  # the image itself was read wrongly: a random defence has given in
        probes = min(int(init_eval * math.sqrt(number)), 10_000)
        direction = yield from _gradient(current, radius, probes, generator, norm)
        current = yield from _step(image, current, direction, number, norm)


def length(change: Tensor, norm: str) -> float:
    """Norm of one image's change, on the [0, 1] scale."""
    return float(change.abs().max() if norm == "Linf" else torch.linalg.vector_norm(change))


def _start(image: Tensor, generator: torch.Generator, init_size: int) -> Walk[Tensor | None]:
    """Uniform noise that is adversarial, drawn near to the image on a straight line; None where none was found."""
    for _ in range(init_size):
        noise = torch.rand(image.shape, generator=generator, dtype=image.dtype)
        if (yield noise[None]).item():
            return (yield from _bisect(partial(torch.lerp, image, noise), high=1.0, threshold=0.001))
    return None


def _to_boundary(image: Tensor, current: Tensor, norm: str) -> Walk[Tensor]:
    """The adversarial end of the last interval of a binary search between ``image`` and ``current``."""
    values = image.numel()
    if norm == "L2":
        threshold = 0.01 / math.sqrt(values)
        return (yield from _bisect(partial(torch.lerp, image, current), high=1.0, threshold=threshold))
    high = length(current - image, norm)
    threshold = 0.01 / values * min(high, 1.0)
    return (
        yield from _bisect(
            lambda radius: torch.clamp(current, image - radius, image + radius), high=high, threshold=threshold
        )
    )


def _bisect(make: Callable[[float], Tensor], *, high: float, threshold: float) -> Walk[Tensor]:
    """Halve [0, high] until it is as short as ``threshold``; ``make(high)`` stays adversarial, ``make(0)`` is not."""
    low = 0.0
    while high - low > threshold:
        middle = (low + high) / 2
        if (yield make(middle)[None]).item():
            high = middle
        else:
            low = middle
    return make(high)


def _gradient(current: Tensor, radius: float, probes: int, generator: torch.Generator, norm: str) -> Walk[Tensor]:
    """Direction [3, H, W] into the adversarial side, from answers about random probes (Eq. 9, 14 and 16)."""
    shape = (probes, *current.shape)
    if norm == "L2":
        noise = torch.randn(shape, generator=generator, dtype=current.dtype)
    else:
        noise = torch.rand(shape, generator=generator, dtype=current.dtype) * 2 - 1
    noise /= torch.linalg.vector_norm(noise.flatten(1), dim=1).view(-1, 1, 1, 1)
    asked = (current + radius * noise).clamp(0, 1)
    signs = (yield asked).to(current.dtype) * 2 - 1
    # The mean is taken off to lower the variance; where all answers agree it would leave nothing.
    weights = signs if bool((signs == signs[0]).all()) else signs - signs.mean()
    estimate = (weights.view(-1, 1, 1, 1) * (asked - current)).mean(dim=0)
    if norm == "Linf":
        return estimate.sign()
    return estimate / torch.linalg.vector_norm(estimate).clamp_min(torch.finfo(estimate.dtype).tiny)


def _step(image: Tensor, current: Tensor, direction: Tensor, number: int, norm: str) -> Walk[Tensor]:
    """Step along ``direction`` by distance / sqrt(number), halved until the image is adversarial."""
    size = length(current - image, norm) / math.sqrt(number)
    for _ in range(_HALVINGS):
        candidate = (current + size * direction).clamp(0, 1)
        if (yield candidate[None]).item():
            return candidate
        size /= 2
    return current
