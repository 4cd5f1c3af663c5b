"""A trace of a few steps of a run."""

from __future__ import annotations

import pathlib
from typing import Any

import jax

# Steps of this process before the trace: the first ones compile and fill what is fetched ahead.
SKIPPED = 10

STEPS = 5


class Profiler:
  """Traces steps, once; what it writes TensorBoard's profile plugin, XProf and Perfetto read. A context manager."""

  def __init__(self, folder: pathlib.Path | None):
    """`folder` None: there is nothing to trace."""
    self._folder, self._tracing, self._end = folder, False, 0

  def __enter__(self) -> Profiler:
    return self

  def __exit__(self, *unused: object) -> None:
    self._stop()

  def before(self, step: int, state: Any) -> None:
    """Is told of every step that begins, counted from 0, with the state that it begins with."""
    if self._folder is None or step < SKIPPED:
      return
    if not self._end:
      jax.block_until_ready(state)
      jax.profiler.start_trace(str(self._folder))
      self._tracing, self._end = True, step + STEPS
    elif self._tracing and step >= self._end:
      jax.block_until_ready(state)
      self._stop()

  def _stop(self) -> None:
    if self._tracing:
      jax.profiler.stop_trace()
      self._tracing = False
