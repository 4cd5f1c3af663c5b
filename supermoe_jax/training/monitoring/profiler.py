"""Traces a few steps of a run with JAX' profiler."""

from __future__ import annotations

import pathlib
from typing import Any

import jax

# Steps of this process before the trace: the first steps compile, and fill the prefetch buffers.
SKIPPED = 10

STEPS = 5


class Profiler:
  """A context manager that traces `STEPS` steps once, for TensorBoard's profile plugin, XProf and Perfetto."""

  def __init__(self, folder: pathlib.Path | None):
    """Prepares a trace into `folder`; None: no trace."""
    self._folder, self._tracing, self._end = folder, False, 0

  def __enter__(self) -> Profiler:
    return self

  def __exit__(self, *unused: object) -> None:
    self._stop()

  def before(self, step: int, state: Any) -> None:
    """Starts or ends the trace; call it before every step, counted from 0, with the state that the step begins with."""
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
