"""Batches the users of requests that arrive within a few milliseconds, or while the encoder is busy.

Shapes: n users of a request, D width.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from supermoe_jax.serving.loader import ExportedEncoder, Prepared


class OverloadedError(RuntimeError):
  """Error of a request that arrives while too many users wait."""


class _Waiting(NamedTuple):
  prepared: Sequence[Prepared]
  done: asyncio.Future[np.ndarray]


class Batcher:
  """An asynchronous context manager that embeds users in batches, one batch at a time, in a thread of its own.

  A user's vector does not depend on the other users of the batch: the mixture of experts drops nothing.
  """

  def __init__(self, encoder: ExportedEncoder, *, wait: float = 0.004, most_waiting: int = 512):
    """Creates a batcher.

    Args:
      encoder: the encoder.
      wait: seconds that the first user of a batch waits for others.
      most_waiting: most users that may wait at a time.
    """
    self._encoder, self._wait, self._most = encoder, wait, most_waiting
    self._largest = max(encoder.batch_sizes)
    self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "encoder")
    self.waiting = 0  # users accepted and not yet answered

  async def __aenter__(self) -> Batcher:
    self._task = asyncio.create_task(self._work())
    return self

  async def __aexit__(self, *unused: object) -> None:
    self._task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
      await self._task
    self._thread.shutdown()

  async def embed(self, prepared: Sequence[Prepared]) -> np.ndarray:
    """Returns the embeddings of a request's users, `[n, D]`.

    Raises:
      OverloadedError: too many users wait already; an idle batcher accepts any request.
    """
    if self.waiting and self.waiting + len(prepared) > self._most:
      raise OverloadedError(f"{self.waiting} users wait")
    done: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
    self.waiting += len(prepared)
    try:
      self._queue.put_nowait(_Waiting(prepared, done))
      return await done
    finally:
      self.waiting -= len(prepared)

  def _fill(self, batch: list[_Waiting]) -> bool:
    """Adds waiting requests to a batch, and returns whether it is full."""
    users = sum(len(w.prepared) for w in batch)
    while users < self._largest and not self._queue.empty():
      batch.append(self._queue.get_nowait())
      users += len(batch[-1].prepared)
    return users >= self._largest

  async def _work(self) -> None:
    loop = asyncio.get_running_loop()
    while True:
      batch = [await self._queue.get()]
      if not self._fill(batch):
        await asyncio.sleep(self._wait)
        self._fill(batch)
      batch = [w for w in batch if not w.done.done()]  # cancelled requests need no answer
      if not batch:
        continue
      users = [p for w in batch for p in w.prepared]
      try:
        vectors = await loop.run_in_executor(self._thread, self._encoder.run, users)
      except Exception as error:  # fails this batch's requests; the next ones go on
        for waiting in batch:
          if not waiting.done.done():
            waiting.done.set_exception(error)
        continue
      place = 0
      for waiting in batch:
        if not waiting.done.done():
          waiting.done.set_result(vectors[place : place + len(waiting.prepared)])
        place += len(waiting.prepared)
