"""Ends of a run that is not done: it was asked to stop, or its numbers are no longer numbers."""

from __future__ import annotations

import pathlib
import signal
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Stopped(BaseException):
  """A run that was asked to stop is saved and can go on; like an interruption, no error that anyone should handle."""


class Signals:
  """Listens for SIGTERM and SIGINT while a run trains; a second SIGINT stops it where it is.

  Of several hosts each is told of a signal that any of them got, at the same step; JAX' preemption service sees to it.
  There a SIGINT is passed on as a SIGTERM. Outside of a program's main thread nothing can listen, and nothing does.
  """

  def __init__(self) -> None:
    self._got = ""
    self._before: dict[signal.Signals, Any] = {}

  def __enter__(self) -> Signals:
    if threading.current_thread() is threading.main_thread():
      for each in (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM):
        self._before[each] = signal.signal(each, self._take)
    return self

  def __exit__(self, *unused: object) -> None:
    for each, handler in self._before.items():
      signal.signal(each, handler)

  def _take(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self._got and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._got = signal.Signals(number).name
    if jax.process_count() > 1:
      signal.raise_signal(signal.SIGTERM)

  def asked(self, step: int) -> str:
    """What asked the run to stop after `step`, "" if nothing did; on several hosts all must call, once a step."""
    if jax.process_count() == 1:
      return self._got
    return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else ""


def save_batch(file: pathlib.Path, batch: Any) -> None:
  """Writes every array of a batch to an .npz file, named by its path in the batch."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
  file.parent.mkdir(parents=True, exist_ok=True)
  arrays: dict[str, Any] = {jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(v) for p, v in leaves}
  np.savez_compressed(file, **arrays)
