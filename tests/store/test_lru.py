"""The memory for entries: bounded in bytes, the least recently used go first."""

from __future__ import annotations

from dipguard.store.lru import ByteLRU


def test_least_recently_used_go_first():
    cache = ByteLRU(100)
    for key in "abc":
        cache.put(key, key.upper(), size=40)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (None, "B", "C")
    cache.get("b")
    cache.put("d", "D", size=40)
    assert (cache.get("c"), cache.get("b"), cache.bytes) == (None, "B", 80)


def test_a_value_is_replaced_and_counted_once():
    cache = ByteLRU(100)
    cache.put("a", 1, size=90)
    cache.put("a", 2, size=30)
    assert (cache.get("a"), cache.bytes) == (2, 30)


def test_what_is_larger_than_the_bound_is_not_kept():
    cache = ByteLRU(100)
    cache.put("a", 1, size=60)
    cache.put("b", 2, size=101)
    assert (cache.get("a"), cache.get("b"), cache.bytes) == (1, None, 60)


def test_clear_and_drop():
    cache = ByteLRU(100)
    cache.put("a", 1, size=60)
    cache.put("b", 1, size=20)
    cache.drop("a")
    assert (cache.get("a"), cache.bytes) == (None, 20)
    cache.clear()
    assert (cache.get("b"), cache.bytes) == (None, 0)
