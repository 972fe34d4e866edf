"""Find images, labels and indices in a batch of any structure, and replace the images."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
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


def default_images(batch: Any) -> tuple[Key, ...]:
    """Return the default place of the images: the batch itself if it is a tensor, else its first item.

    Raises:
        TypeError: Neither is a tensor.
    """
    if isinstance(batch, Tensor):
        return ()
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return (0,)
    raise TypeError(f"`images` must say where in the batch the images are: the batch is {describe(batch)}")


def default_labels(batch: Any) -> tuple[Key, ...] | None:
    """Return the default place of the labels: the second item of a tuple or list, if that is a tensor."""
    found = isinstance(batch, (tuple, list)) and len(batch) > 1 and isinstance(batch[1], Tensor)
    return (1,) if found else None


def part_of(batch: Any, place: tuple[Key, ...], *, name: str) -> Tensor:
    """Return the tensor at a place.

    Raises:
        ValueError: There is nothing at that place.
        TypeError: It is not a tensor.
    """
    part = batch
    for key in place:
        try:
            part = _get(part, key)
        except (KeyError, IndexError, AttributeError, TypeError):
            here = describe(part)
            raise ValueError(f"`{name}` must name a part of the batch, got {place!r}: there is {here}") from None
    if not isinstance(part, Tensor):
        raise TypeError(f"`{name}` must name a tensor, got {place!r}: there is {describe(part)}")
    return part


def with_part(batch: Any, place: tuple[Key, ...], value: Tensor) -> Any:
    """Return a copy of the batch with another tensor at a place; the given batch is not changed."""
    if not place:
        return value
    key, rest = place[0], place[1:]
    new = with_part(_get(batch, key), rest, value)
    if isinstance(batch, tuple) and isinstance(key, int):
        parts = list(batch)
        parts[key] = new
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    other = copy.copy(batch)
    if isinstance(other, (MutableMapping, list)):
        other[key] = new  # type: ignore[index]
    elif isinstance(batch, tuple):
        return batch._replace(**{str(key): new})  # type: ignore[attr-defined]
    else:
        object.__setattr__(other, str(key), new)  # frozen dataclasses too
    return other


def describe(part: Any) -> str:
    """Describe a part of a batch in words, for error messages."""
    if isinstance(part, Mapping):
        return f"a {type(part).__name__} with the keys {', '.join(map(repr, part))}"
    if isinstance(part, (tuple, list)):
        return f"a {type(part).__name__} of {', '.join(type(item).__name__ for item in part) or 'nothing'}"
    return f"a {type(part).__name__}"


def _get(part: Any, key: Key) -> Any:
    if isinstance(part, Tensor):
        raise KeyError(key)  # a tensor can be indexed, but its items are not parts of the batch
    if isinstance(part, Mapping) or isinstance(key, int):
        return part[key]
    return getattr(part, key)
