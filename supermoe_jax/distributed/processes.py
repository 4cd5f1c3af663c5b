"""The processes of a run: which there are, how they come together, and what they tell each other.

Alone, a process is the first of one, and nothing here waits.
"""

from __future__ import annotations

import socket
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from supermoe_jax.errors import ConfigError

# Seconds that a cluster may take to tell where its first process is.
_DETECTION_SECONDS = 300


class Place(NamedTuple):
  """A process among others: `coordinator` is HOST:PORT of the first, `process` counts from 0 to `processes` - 1."""

  coordinator: str
  processes: int
  process: int


def find_place(
  coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> Place | None:
  """Finds this process' place: as it is told, else as the cluster tells JAX; None where it is alone.

  JAX knows Cloud TPU pods, GKE and Kubernetes jobs with an index (JobSet), SLURM and Open MPI. No backend is touched.

  Raises:
    ConfigError: only some of the three are told.
  """
  told = (coordinator, processes, process)
  if any(t is not None for t in told):
    if coordinator is None or processes is None or process is None:
      raise ConfigError("--coordinator HOST:PORT, --processes N and --process I belong together; name all three.")
    if not 0 <= process < processes:
      raise ConfigError(f"--process={process} must lie between 0 and --processes={processes} less one.")
    if not coordinator.rpartition(":")[2].isdigit():
      raise ConfigError(f"--coordinator={coordinator} must be HOST:PORT, as all processes reach the first one.")
    return Place(coordinator, processes, process) if processes > 1 else None
  from jax._src import clusters  # there is no public way to ask without joining

  detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
  try:
    coordinator, processes, process, _ = detect(None, None, None, None, None, _DETECTION_SECONDS)
  except RuntimeError as error:
    raise ConfigError(
      f"JAX finds a cluster, and not this process' place in it ({error}); say it by --coordinator HOST:PORT, "
      "--processes N and --process I (--processes 1 where this process is alone)."
    ) from error
  if coordinator is None or processes is None or process is None or processes == 1:
    return None
  return Place(coordinator, processes, process)


def initialize(place: Place | None) -> None:
  """Joins the other processes; call it before anything asks JAX for a device. Alone, does nothing."""
  if place is None or jax.distributed.is_initialized():
    return
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(place.coordinator, place.processes, place.process)


def leave() -> None:
  """Parts from the other processes once all are here, so that none takes another's end for a failure."""
  if jax.distributed.is_initialized():
    jax.distributed.shutdown()


def is_first() -> bool:
  """Whether this process is the one that writes what is written once."""
  return jax.process_index() == 0


def gather_text(text: str) -> list[tuple[str, str]]:
  """Returns what each process says, with its name as " (process i, host)", or "" where it is alone; all must call."""
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
  """Brings an array to the host, wherever its parts lie; of several processes all must call."""
  if isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated):
    value = multihost_utils.process_allgather(value, tiled=True)
  return np.asarray(value)


def meet(what: str) -> None:
  """Waits until every process is here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)
