"""Find images, labels and indices in a batch of any structure, and replace the images."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Key = int | str
Place = Key | tuple[Key, ...]
"""A position, a key or an attribute; a tuple of them for nested batches; () is the batch itself."""


def check_place(place: Any, *, name: str) -> tuple[Key, ...]:
    """Return a place as a tuple of keys; a TypeError if it is not an int, a str or a tuple of those."""
    keys = place if isinstance(place, tuple) else (place,)
    if any(isinstance(key, bool) or not isinstance(key, (int, str)) for key in keys):
        raise TypeError(f"`{name}` must be a position, a key, or a tuple of them, got {place!r}")
    return keys


def default_places(batch: Any) -> tuple[tuple[Key, ...], tuple[Key, ...] | None]:
    """Return where images and labels are by default; TypeError if neither the batch nor its first item is a tensor."""
    if isinstance(batch, Tensor):
        return (), None
    items = [*batch[:2]] if isinstance(batch, (tuple, list)) else []
    if not items or not isinstance(items[0], Tensor):
        raise TypeError(f"`images` must say where in the batch the images are: the batch is {_describe(batch)}")
    return (0,), (1,) if isinstance(items[-1], Tensor) and len(items) > 1 else None


def part_of(batch: Any, place: tuple[Key, ...], *, name: str) -> Tensor:
    """Return the tensor at a place; ValueError if there is nothing, TypeError if it is something else."""
    part = batch
    for key in place:
        try:
            part = _get(part, key)
        except (KeyError, IndexError, AttributeError, TypeError):
            here = _describe(part)
            raise ValueError(f"`{name}` must name a part of the batch, got {place!r}: there is {here}") from None
    if not isinstance(part, Tensor):
        raise TypeError(f"`{name}` must name a tensor, got {place!r}: there is {_describe(part)}")
    return part


def with_part(batch: Any, place: tuple[Key, ...], value: Tensor) -> Any:
    """Return a copy of the batch with another tensor at a place; the given batch is not changed."""
    if not place:
        return value
    key, new = place[0], with_part(_get(batch, place[0]), place[1:], value)
    if isinstance(batch, tuple):
        parts = list(batch)
        parts[key if isinstance(key, int) else batch._fields.index(key)] = new  # type: ignore[attr-defined]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    other = copy.copy(batch)
    if isinstance(batch, (Mapping, list)):
        other[key] = new
    else:
        object.__setattr__(other, str(key), new)  # frozen dataclasses too
    return other


def _describe(part: Any) -> str:
    keys = f" with the keys {', '.join(map(repr, part))}" if isinstance(part, Mapping) else ""
    return f"a {type(part).__name__}{keys}"


def _get(part: Any, key: Key) -> Any:
    if isinstance(part, Tensor):
        raise KeyError(key)  # a tensor can be indexed, but its items are not parts of the batch
    return part[key] if isinstance(part, Mapping) or isinstance(key, int) else getattr(part, key)
