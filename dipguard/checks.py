"""Checks at the door: each raises an error that names the argument, what came and what was expected."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from math import isfinite
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Indices: TypeAlias = "Tensor | Sequence[int]"
"""Positions of N images in their data set: an integer tensor [N], or a list, range or array of N integers."""
ROUNDING = 1e-6
"""What rounding may add to [0, 1], as when images are normalised and brought back."""


def check_images(images: Tensor, *, name: str = "images") -> Tensor:
    """Return ``images``, a float tensor [B, 3, H, W] with B >= 1, clamped where it is within 1e-6 of [0, 1].

    Raises:
        TypeError: not a tensor, or not a floating-point one (uint8 images must be divided by 255 first).
        ValueError: wrong rank or channels, no images, NaN or infinite values, values outside [0, 1].
    """
    import torch

    if not isinstance(images, torch.Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor [B, 3, H, W], got {type(images).__name__}")
    check_not_forked(works=False)  # large images are looked at in several threads
    shape = tuple(images.shape)
    if images.ndim != 4:
        raise ValueError(f"`{name}` must have 4 dimensions [B, 3, H, W], got shape {shape}")
    if shape[1] != 3:
        raise ValueError(f"`{name}` must have 3 channels (RGB, [B, 3, H, W]), got shape {shape}")
    if 0 in shape:
        raise ValueError(f"`{name}` must hold at least one image of at least one pixel, got shape {shape}")
    if not images.is_floating_point():
        raise TypeError(f"`{name}` must be floats in [0, 1], got {images.dtype}; divide integer images by 255")
    low, high = (float(v) for v in torch.aminmax(images.detach()))
    if not (isfinite(low) and isfinite(high)):  # NaN anywhere makes both NaN
        raise ValueError(f"`{name}` must be finite, got NaN or infinite values")
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise ValueError(f"`{name}` must lie in [0, 1], got values from {low:.8g} to {high:.8g}")
    return images.clamp(0, 1) if low < 0 or high > 1 else images


def check_labels(labels: Tensor, *, count: int, num_classes: int | None = None) -> Tensor:
    """Return ``labels`` as int64 if it is [count] integers in [0, num_classes), else raise TypeError or ValueError."""
    import torch

    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        kind = labels.dtype if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise TypeError(f"`labels` must be an integer tensor [{count}], got {kind}")
    if tuple(labels.shape) != (count,):
        raise ValueError(f"`labels` must have shape ({count},), one label an image, got {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        limit = "" if num_classes is None else f" and below {num_classes}"
        raise ValueError(f"`labels` must be at least 0{limit}, got labels from {low} to {high}")
    return labels.long()


def check_indices(indices: Indices | None, *, count: int) -> list[int]:
    """Return the indices of ``count`` images as a list; 0 to ``count`` - 1 for None.

    TypeError if they are no row of integers; ValueError for another number of them, or an index below 0.
    """
    given: Any = range(count) if indices is None else indices
    values = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(values, Sequence) or any(isinstance(v, bool) or not isinstance(v, Integral) for v in values):
        kind = f"{given.dtype} {tuple(given.shape)}" if hasattr(given, "tolist") else repr(given)
        raise TypeError(f"`indices` must be integers, one per image ({count}), got {kind}")
    if len(values) != count:
        raise ValueError(f"`indices` must hold one index per image ({count}), got {len(values)}")
    if min(values) < 0:
        raise ValueError(f"`indices` must be at least 0, got {min(values)}")
    return [int(value) for value in values]


def check_made(images: Tensor, *, by: str) -> Tensor:
    """Return images that an attack or a defence made if they lie in [0, 1]; RuntimeError else."""
    low, high = (float(value) for value in images.aminmax())
    if not (low >= 0 and high <= 1):  # false for NaN
        raise RuntimeError(f"{by} left [0, 1]: its values go from {low:.8g} to {high:.8g}")
    return images


def check_int(value: Any, *, name: str, low: int, high: int | None = None) -> int:
    """Return ``value`` if it is an int from ``low`` to ``high``; TypeError (also for a bool) or ValueError else."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"`{name}` must be {limit}, got {value}")
    return value


def check_float(value: Any, *, name: str, low: float, high: float | None = None) -> float:
    """Return ``value`` as a float if it is a finite number from ``low`` to ``high``, else TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {value!r}")
    number = float(value)
    if not low <= number <= (float("inf") if high is None else high) or number == float("inf"):
        limit = f"finite and at least {low:g}" if high is None else f"from {low:g} to {high:g}"
        raise ValueError(f"`{name}` must be {limit}, got {value}")
    return number


def check_positive(value: Any, *, name: str, high: float | None = None) -> float:
    """Return ``value`` as a float if it is finite, above 0 and at most ``high``; TypeError or ValueError else."""
    number = check_float(value, name=name, low=0, high=high)
    if number == 0:
        raise ValueError(f"`{name}` must be above 0{'' if high is None else f' and at most {high:g}'}, got {value}")
    return number


def check_bool(value: Any, *, name: str) -> bool:
    """Return ``value`` if it is True or False, else raise TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be true or false, got {value!r}")
    return value


def check_choice(value: Any, choices: Collection[str], *, name: str) -> str:
    """Return ``value`` if it is one of ``choices``, else raise a ValueError that lists them."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(str, choices))}, got {value!r}")
    return str(value)


_worker: int | None = None
"""The process whose torch threads have worked."""


def check_not_forked(*, works: bool = True) -> None:
    """Raise RuntimeError in a forked process whose parent's torch threads have worked: there torch would hang for ever.

    With a single thread, as in the workers of a ``DataLoader``, it does not hang. With ``works`` it also notes
    that this process's threads are in use from now on.
    """
    global _worker
    import torch

    if torch.get_num_threads() == 1:
        return
    if works:
        _worker = _worker or os.getpid()
    if _worker not in (None, os.getpid()):
        raise RuntimeError(
            "this process was forked from one that has used torch in several threads, and torch would hang here: start "
            "it with 'spawn' or 'forkserver' (multiprocessing, DataLoader's `multiprocessing_context`), or call "
            "torch.set_num_threads(1) in it first"
        )
