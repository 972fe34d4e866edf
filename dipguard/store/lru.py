"""What was read from the store a moment ago: many settings replay the same entries in one process."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

CACHE_BYTES = 512 * 2**20
"""Default bound of a store's memory."""


class ByteLRU:
    """Values by key, the least recently used ones dropped when their sizes add up to more than a bound.

    Args:
        most: The bound in bytes; 0 keeps nothing.
    """

    def __init__(self, most: int = CACHE_BYTES) -> None:
        self.most = most
        self.bytes = 0
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Any | None:
        """The value, which now is the most recently used; None if it is not there."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: Any, *, size: int) -> None:
        """Keep a value of ``size`` bytes, unless it alone is larger than the bound."""
        with self._lock:
            self._drop(key)
            if size > self.most:
                return
            self._values[key] = (value, size)
            self.bytes += size
            while self.bytes > self.most:
                self._drop(next(iter(self._values)))

    def drop(self, key: Hashable) -> None:
        """Forget a value."""
        with self._lock:
            self._drop(key)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._values.clear()
            self.bytes = 0

    def _drop(self, key: Hashable) -> None:
        if key in self._values:
            self.bytes -= self._values.pop(key)[1]
