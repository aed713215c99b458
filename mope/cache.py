"""Predictions of requests that were seen before: the network is asked once, what is learned while serving stays live.

A bounded map from what a prediction depends on to what the network made of it, oldest use out first. Knows keys and
values; not what they mean.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

from mope.forking import after_fork

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class CacheStats:
    """How a cache did so far.

    Attributes:
        hits: look-ups that found something.
        misses: look-ups that did not.
        size: entries that it holds.
        capacity: entries that it may hold.
    """

    hits: int
    misses: int
    size: int
    capacity: int


class LruCache(Generic[Value]):
    """The most recently used entries. Safe to use from many threads, and in children of a fork.

    Args:
        capacity: entries that it may hold; 0 keeps nothing.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = Lock()
        self._hits = self._misses = 0
        after_fork(self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = Lock()

    def __bool__(self) -> bool:
        """Whether it keeps anything at all."""
        return self._capacity > 0

    def get(self, key: Hashable) -> Value | None:
        """The entry of a key, now the most recently used; None if there is none."""
        with self._lock:
            value = self._entries.get(key)
            if value is None:
                self._misses += 1
            else:
                self._hits += 1
                self._entries.move_to_end(key)
            return value

    def put(self, key: Hashable, value: Value) -> None:
        """Keep an entry, and let the least recently used one go if there is no room."""
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            while len(self._entries) > self._capacity:
                self._entries.popitem(last=False)

    def clear(self) -> None:
        """Forget all entries; the counters go on."""
        with self._lock:
            self._entries.clear()

    @property
    def stats(self) -> CacheStats:
        """Counters so far."""
        with self._lock:
            return CacheStats(self._hits, self._misses, len(self._entries), self._capacity)
