"""Provides an endless stream of batches, whose position can be saved and restored on any number of hosts.

All batches are elements of one sequence that is the same on every host: element i depends on the seed and on i only. A
batch of `batch_rows` rows is cut into one run of rows per host; host h of n makes the runs h, h + n, h + 2n, … of the
sequence. So the hosts' rows side by side are the rows that a single host would have made, in the same order. The
position of all hosts is one number: the rows that they have handed out together. Saving it needs no exchange between
hosts. A run that stopped after any batch goes on at that row on 1, 2 or 4 hosts, and hands out every row of an epoch
once.

Packing does not change this: before the first row is made, `packing.PackingPlan` decides for the whole epoch which
users share a row, by the same rule on every host. A plan that grew while rows are made would put hosts out of step:
from equally many users one host makes more rows than another.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from multiprocessing import connection
from typing import Any, Generic, TypeVar

import grain
import numpy as np
from absl import flags

from supermoe_jax import config
from supermoe_jax.errors import DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Rows of a stream, endless for all purposes; Grain overflows on a truly endless one.
MOST_ROWS = 2**48


# Number of worker deaths that a run survives.
MOST_DEATHS = 3

# Part of Grain's message about a dead worker.
_DIED = "terminated unexpectedly"


def _in_a_worker(index: int, count: int) -> None:
  """Makes a worker ignore Ctrl-C, which its parent process handles, and end when its parent ends."""
  del index, count
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  if parent is not None:
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
  connection.wait([sentinel])
  os._exit(1)


class BatchStream(Generic[T]):
  """The batches of one host; each `iter` starts at the first batch."""

  def __init__(
    self,
    runs: grain.MapDataset[T],
    identity: dict[str, Any],
    batch_rows: int,
    shard: tuple[int, int],
    workers: int = 0,
    description: str = "",
  ):
    """Makes the stream of a host.

    Args:
      runs: the runs of all hosts, of `batch_rows / count` rows each.
      identity: the settings that the rows depend on, as numbers or strings by name; `batch` refuses another's position.
      batch_rows: the number of rows of a batch over all hosts.
      shard: the host's `(index, count)`.
      workers: the number of processes that make the batches; 0 for two threads of this process.
      description: a sentence about the rows for the user to read; "" for none.
    """
    self._runs, self._identity, self._rows, self._shard, self.workers = runs, identity, batch_rows, shard, workers
    self.description = description

  def __iter__(self) -> StreamPosition[T]:
    return StreamPosition(self)

  def start(self, batch: int, workers: int) -> Iterator[T]:
    """Returns the host's batches from number `batch` on, made by `workers` processes."""
    index, count = self._shard
    rest = self._runs[index::count][batch:].to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
    if workers:
      if not flags.FLAGS.is_parsed():  # Grain's processes read its flags, which only an absl main program parses
        flags.FLAGS.mark_as_parsed()
      options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
      rest = rest.mp_prefetch(options, worker_init_fn=_in_a_worker)
    return iter(rest)

  def state(self, batch: int) -> dict[str, Any]:
    """Returns the position before batch number `batch`."""
    return {"rows": batch * self._rows, **self._identity}

  def batch(self, state: dict[str, Any]) -> int:
    """Returns the number of the batch that comes next at a position.

    Raises:
      DataError: the position is of another stream, or lies within a batch.
    """
    expected = set(self._identity) | {"rows"}
    if set(state) != expected:
      raise DataError(
        f"the saved position of the data has the parts {sorted(state)}, not {sorted(expected)}: it was written by "
        "another version. Train again in another --workdir."
      )
    changed = config.differences({k: state[k] for k in self._identity}, self._identity, "position")
    if changed:
      raise DataError(
        f"the saved position of the data is one of other rows ({'; '.join(changed)}). Train again in another --workdir."
      )
    number, rest = divmod(state["rows"], self._rows)
    if rest:
      raise DataError(
        f"the saved position of the data, {state['rows']} rows, lies within a batch of config.train.batch_rows="
        f"{self._rows}; go on with a batch_rows that divides it."
      )
    return number


def _copied(value: Any) -> Any:
  """Returns a batch, of nested tuples and mappings, with copies of its arrays."""
  if isinstance(value, Mapping):
    return {name: _copied(part) for name, part in value.items()}
  if isinstance(value, tuple):
    parts = [_copied(part) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
  return np.array(value) if isinstance(value, np.ndarray) else value


class StreamPosition(Generic[T]):
  """A host's position in its stream: an iterator with `get_state` and `set_state`."""

  def __init__(self, stream: BatchStream[T]):
    self._stream, self._batch = stream, 0
    self._died = 0
    self._rest: Iterator[T] | None = None  # started at the first `next`, at the position by then

  def __iter__(self) -> StreamPosition[T]:
    return self

  def __next__(self) -> T:
    if self._rest is None:
      self._rest = self._stream.start(self._batch, self._stream.workers)
    try:
      found = next(self._rest)
    except RuntimeError as error:
      if not self._stream.workers or _DIED not in str(error):
        raise
      return self._again(error)
    self._batch += 1
    # A worker's arrays lie in shared memory, which would be left behind if the process ended before they are deleted.
    return _copied(found) if self._stream.workers else found

  def _again(self, error: RuntimeError) -> T:
    """Starts new workers after a worker died; a batch depends on its number alone, so none is lost or repeated."""
    self._died += 1
    reason = str(error).splitlines()[0].rstrip(".")
    if self._died > MOST_DEATHS:
      raise DataError(
        f"workers that make batches died {self._died} times ({reason}). If the system is out of memory, lower "
        f"config.train.workers={self._stream.workers}; the same command goes on from the newest checkpoint."
      ) from error
    logger.warning(f"a worker that makes batches died ({reason}); others take up its work")
    self.close()
    return next(self)

  def again(self, batch: int) -> T:
    """Makes the batch with this number once more; the position stays."""
    return next(self._stream.start(batch, 0))

  def close(self) -> None:
    """Ends the worker processes, if there are any; the position stays, and `next` starts new workers."""
    if self._rest is not None and hasattr(self._rest, "close"):
      self._rest.close()
    self._rest = None

  def get_state(self) -> dict[str, Any]:
    """Returns the position as a small dict for JSON; it is the same on all hosts after the same number of steps."""
    return self._stream.state(self._batch)

  def set_state(self, state: dict[str, Any]) -> None:
    """Moves to a saved position, which may come from another number of hosts or workers.

    Raises:
      DataError: see `BatchStream.batch`.
    """
    self._batch = self._stream.batch(state)
    self.close()
