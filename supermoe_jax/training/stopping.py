"""Ends of a run that is not done: it was asked to stop, or its numbers are no longer numbers."""

from __future__ import annotations

import pathlib
import signal
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Signals:
  """Listens for SIGTERM and SIGINT while a run trains; a second SIGINT stops it where it is.

  Of several processes each is told of a signal that any of them got, at the same step; JAX' preemption service, which
  takes SIGTERM over when processes have joined, sees to it. A SIGINT is passed on to it as a SIGTERM. Outside of a
  program's main thread nothing can listen, and nothing does.
  """

  def __init__(self, several: bool = False) -> None:
    """`several`: the process is one of several."""
    self._got, self._several, self._joined = "", several, False
    self._before: dict[signal.Signals, Any] = {}

  def __enter__(self) -> Signals:
    if threading.current_thread() is threading.main_thread():
      for each in (signal.SIGINT, signal.SIGTERM):
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
    if self._joined:
      signal.raise_signal(signal.SIGTERM)

  def joined(self) -> None:
    """Is told once this process has joined the others, if there are any."""
    self._joined = self._several
    if self._joined and self._got:
      signal.raise_signal(signal.SIGTERM)

  @property
  def got(self) -> str:
    """The signal that this process got; "" without one."""
    return self._got

  def asked(self, steps: Iterable[int]) -> str:
    """What asked the run to stop in `steps`, which are done; "" if nothing did.

    Of several processes all must call, with every step: JAX names one, and asks which it is.
    """
    if not self._several:
      return self._got
    reached = [multihost_utils.reached_preemption_sync_point(step) for step in steps]
    return "SIGTERM" if any(reached) else ""


def save_batch(file: pathlib.Path, batch: Any) -> None:
  """Writes every array of a batch to an .npz file, named by its path in the batch."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
  file.parent.mkdir(parents=True, exist_ok=True)
  arrays: dict[str, Any] = {jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(v) for p, v in leaves}
  np.savez_compressed(file, **arrays)
