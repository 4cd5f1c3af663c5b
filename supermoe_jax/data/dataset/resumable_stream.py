"""An endless stream of batches with a position that can be saved, and restored on any number of hosts.

All batches are elements of one sequence that is the same on every host: element i of it depends on the seed and on i
only. A batch of `batch_rows` rows is cut into as many runs of rows as there are hosts; host h of n makes the runs h,
h + n, h + 2n, … of the sequence. So the hosts' rows side by side are the rows that one host would have made, in the
same order, and the position of all of them is one number: the rows that all hosts together have handed out. Nothing
needs to be exchanged to save it. Stopped after any batch, a run goes on at that row on 1, 2 or 4 hosts, and every row
of an epoch is handed out once.

Packing does not change this: before the first row is made, `packing.PackingPlan` decides for the whole epoch which
users share a row, by the same rule on every host. A plan that grew while rows are made would put hosts out of step: of
equally many users one host makes more rows than another.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import connection
from typing import Any, Generic, TypeVar

import grain
from absl import flags

from supermoe_jax import config
from supermoe_jax.errors import DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A stream is endless for all purposes; Grain overflows where it has truly no end.
MOST_ROWS = 2**48


# Workers of a run that may die before it ends.
MOST_DEATHS = 3

# What Grain says of one.
_DIED = "terminated unexpectedly"


def _in_a_worker(index: int, count: int) -> None:
  """Lets a worker leave Ctrl-C to the process that it works for, and end with it."""
  del index, count
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  if parent is not None:
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
  connection.wait([sentinel])
  os._exit(1)


class BatchStream(Generic[T]):
  """The batches of one host; each `iter` starts at the first."""

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
      runs: all hosts' runs of `batch_rows / count` rows.
      identity: what the rows depend on, by name, as numbers or strings; a position of another stream is refused by it.
      batch_rows: rows of a batch of all hosts.
      shard: the host's `(index, count)`.
      workers: processes that make the batches; 0: two threads of this one.
      description: a sentence about the rows that a user should read; "" if there is none.
    """
    self._runs, self._identity, self._rows, self._shard, self.workers = runs, identity, batch_rows, shard, workers
    self.description = description

  def __iter__(self) -> StreamPosition[T]:
    return StreamPosition(self)

  def start(self, batch: int, workers: int) -> Iterator[T]:
    """The host's batches from number `batch` on, made by so many processes."""
    index, count = self._shard
    rest = self._runs[index::count][batch:].to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
    if workers:
      if not flags.FLAGS.is_parsed():  # Grain's processes read its flags, which only a main program of absl's parses
        flags.FLAGS.mark_as_parsed()
      options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
      rest = rest.mp_prefetch(options, worker_init_fn=_in_a_worker)
    return iter(rest)

  def state(self, batch: int) -> dict[str, Any]:
    """The position before batch number `batch`."""
    return {"rows": batch * self._rows, **self._identity}

  def batch(self, state: dict[str, Any]) -> int:
    """The number of the batch that comes next at a position.

    Raises:
      DataError: it is a position of another stream, or lies within a batch.
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


class StreamPosition(Generic[T]):
  """Where a host stands in its stream: an iterator with `get_state` and `set_state`."""

  def __init__(self, stream: BatchStream[T]):
    self._stream, self._batch = stream, 0
    self._died = 0
    self._rest: Iterator[T] | None = None  # started when it is asked for, at the right place

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
    return found

  def _again(self, error: RuntimeError) -> T:
    """Starts workers anew where one of them died: a batch depends on its number alone, so none is lost or repeated."""
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
    """Makes the batch of that number once more; the position stays."""
    return next(self._stream.start(batch, 0))

  def close(self) -> None:
    """Ends the worker processes, if there are any; the position stays, and `next` starts others."""
    if self._rest is not None and hasattr(self._rest, "close"):
      self._rest.close()
    self._rest = None

  def get_state(self) -> dict[str, Any]:
    """The position, the same on all hosts that have made equally many steps; a small dict for JSON."""
    return self._stream.state(self._batch)

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on at a position, of this number of hosts and of workers or another; see `Stream.batch` for errors."""
    self._batch = self._stream.batch(state)
    self.close()
