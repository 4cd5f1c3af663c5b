"""Ends a run early: it listens for stop signals, and saves a batch whose loss or gradients are not finite."""

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
  """A listener for SIGTERM and SIGINT while a run trains; a second SIGINT stops the run at once.

  With several processes, all learn at the same step that one of them got a signal. JAX' preemption service, which takes
  SIGTERM over when processes have joined, sees to it; a SIGINT is passed on to it as a SIGTERM. Outside a program's
  main thread no signal can be received, so the listener does nothing.
  """

  def __init__(self, several: bool = False) -> None:
    """Starts without a signal; `several`: the process is one of several."""
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
    """Notes that this process has joined the others, if there are any."""
    self._joined = self._several
    if self._joined and self._got:
      signal.raise_signal(signal.SIGTERM)

  @property
  def got(self) -> str:
    """Returns the name of the signal that this process got; "" without one."""
    return self._got

  def asked(self, steps: Iterable[int]) -> str:
    """Returns the signal that asks the run to stop after one of `steps`, which are done; "" if none does.

    Several processes must all call this with every step: JAX chooses one step at which all of them stop.
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
