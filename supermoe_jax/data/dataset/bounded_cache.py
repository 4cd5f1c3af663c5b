"""Keeps values in memory up to a number of bytes."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any


class BoundedCache:
  """A cache that keeps values as long as there is room; threads may share it.

  It never evicts a value: epochs go through all records in turn, so the value used last is the last to be used again.
  """

  def __init__(self, room: int):
    self._size = self.room = room  # bytes in all, and bytes left
    self._kept: dict[Hashable, Any] = {}
    self._lock = threading.Lock()
    self.get = self._kept.get

  def __reduce__(self) -> tuple[type[BoundedCache], tuple[int]]:
    return BoundedCache, (self._size,)  # another process has a cache of its own

  def offer(self, key: Hashable, value: Any, size: int) -> None:
    """Keeps the value of `size` bytes if there is room."""
    with self._lock:
      if size <= self.room and key not in self._kept:
        self._kept[key] = value
        self.room -= size
