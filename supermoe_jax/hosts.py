"""What the processes of a run tell each other; alone, a process is the first of one."""

from __future__ import annotations

import socket

import jax
import numpy as np
from jax.experimental import multihost_utils


def first() -> bool:
  """Whether this process is the one that writes what is written once."""
  return jax.process_index() == 0


def gather(text: str) -> list[tuple[str, str]]:
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


def meet(what: str) -> None:
  """Waits until every process is here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)
