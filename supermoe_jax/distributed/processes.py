"""Joins the processes of a run, and exchanges texts and arrays between them.

A process that is alone counts as the first of one process; no function then waits.
"""

from __future__ import annotations

import logging
import socket
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from supermoe_jax.errors import ConfigError

# Seconds that a cluster may take to give the address of its first process.
_DETECTION_SECONDS = 300


class Place(NamedTuple):
  """The place of a process: `coordinator` is HOST:PORT of the first, `process` counts from 0 to `processes` - 1."""

  coordinator: str
  processes: int
  process: int


def find_place(
  coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> Place | None:
  """Returns this process' place, from the arguments or else from the cluster that JAX detects; None if it is alone.

  JAX detects Cloud TPU pods, GKE and Kubernetes jobs with an index (JobSet), SLURM and Open MPI. The call does not
  start a JAX backend.

  Raises:
    ConfigError: only some of the arguments are given, they are not valid, or a cluster does not give the place.
  """
  told = (coordinator, processes, process)
  if any(t is not None for t in told):
    if coordinator is None or processes is None or process is None:
      raise ConfigError("--coordinator HOST:PORT, --processes N and --process I belong together; set all three.")
    if not 0 <= process < processes:
      raise ConfigError(f"--process={process} must be at least 0 and less than --processes={processes}.")
    if not coordinator.rpartition(":")[2].isdigit():
      raise ConfigError(f"--coordinator={coordinator} must be HOST:PORT, the address of the first process.")
    return Place(coordinator, processes, process) if processes > 1 else None
  from jax._src import clusters  # JAX has no public way to detect a cluster without joining it

  detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
  try:
    coordinator, processes, process, _ = detect(None, None, None, None, None, _DETECTION_SECONDS)
  except RuntimeError as error:
    raise ConfigError(
      f"JAX finds a cluster, but not this process' place in it ({error}); set --coordinator HOST:PORT, --processes N "
      "and --process I (--processes 1 if this process is alone)."
    ) from error
  if coordinator is None or processes is None or process is None or processes == 1:
    return None
  return Place(coordinator, processes, process)


def initialize(place: Place | None) -> None:
  """Joins the other processes, if there are any; call this before any code asks JAX for a device."""
  if place is None or jax.distributed.is_initialized():
    return
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(place.coordinator, place.processes, place.process)


def leave() -> None:
  """Disconnects once all processes have called this, so that no process takes the end of another for a failure."""
  if jax.distributed.is_initialized():
    jax.distributed.shutdown()


def is_first() -> bool:
  """Returns whether this process is the first, which writes the files that are written only once."""
  return jax.process_index() == 0


def first_process_only(logger: logging.Logger) -> logging.Logger:
  """Adds a filter to `logger` that drops its records in all processes but the first, and returns the logger.

  A process that has not joined others keeps its records. Until then the filter does not touch JAX's backend.
  """
  logger.addFilter(_is_from_first)  # a filter that is there already is not added again
  return logger


def _is_from_first(record: logging.LogRecord) -> bool:
  del record
  return not jax.distributed.is_initialized() or is_first()


def gather_text(text: str) -> list[tuple[str, str]]:
  """Returns `(name, text)` of each process; all must call. A name is " (process i, host)", or "" for a lone process."""
  if jax.process_count() == 1:
    return [("", text)]
  mine = f"{socket.gethostname()}\n{text}".encode()
  sizes = multihost_utils.process_allgather(np.int32(len(mine)))
  room = np.zeros(int(np.max(sizes)), np.uint8)
  room[: len(mine)] = np.frombuffer(mine, np.uint8)
  said = multihost_utils.process_allgather(room)
  out = []
  for i, (size, data) in enumerate(zip(sizes, said)):
    host, words = data[: int(size)].tobytes().decode().split("\n", 1)
    out.append((f" (process {i}, {host})", words))
  return out


def whole(value: jax.Array | np.ndarray) -> np.ndarray:
  """Returns the whole array on the host, wherever its shards lie; all processes must call."""
  if isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated):
    value = multihost_utils.process_allgather(value, tiled=True)
  return np.asarray(value)


def meet(what: str) -> None:
  """Waits until every process has called this with the same `what`."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)
