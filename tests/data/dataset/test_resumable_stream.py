"""The position of the training stream: one number for all hosts, good for any number of them and of processes."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import operator
import os
import pickle
import signal
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.batch import Batch
from supermoe_jax.data.dataset import resumable_stream, training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.errors import ConfigError, DataError
from tests.fixtures.messages import messages

BATCH = 4  # rows of a batch, of all hosts


def wide(cfg: config.Config, *, packing: bool, **train: Any) -> config.Config:
  """Rows that hold every history whole, so that a record is known by what its row holds."""
  settings = {"batch_rows": BATCH, "packing": packing, "snapshots_per_row": 12, **train}
  return dataclasses.replace(
    cfg, model=dataclasses.replace(cfg.model, max_events=100), train=dataclasses.replace(cfg.train, **settings)
  )


def hosts(dataset: Dataset, cfg: config.Config, count: int) -> list[Any]:
  return [iter(training_batches.training_batches(dataset, cfg, shard=(index, count))) for index in range(count)]


def step(streams: list[Any]) -> Batch:
  """A batch of all hosts, their rows side by side."""
  return jax.tree.map(lambda *rows: np.concatenate(rows), *(next(s) for s in streams))


def assert_equal(one: Batch, two: Batch) -> None:
  jax.tree.map(np.testing.assert_array_equal, one, two)


def records(batch: Batch) -> list[bytes]:
  """What tells the users of a batch's rows apart: the numbers that their events carry."""
  out = []
  for segment, numeric in zip(batch.features.segment, batch.features.numeric):
    out += [numeric[segment == user].tobytes() for user in np.unique(segment[segment > 0])]
  return out


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_the_rows_of_all_hosts_are_those_of_one_host(
  dataset: Dataset, cfg: config.Config, packing: bool, count: int
) -> None:
  cfg = wide(cfg, packing=packing)
  one, many = hosts(dataset, cfg, 1), hosts(dataset, cfg, count)
  for _ in range(12):  # beyond an epoch
    assert_equal(step(many), step(one))
    assert [s.get_state() for s in many] == [one[0].get_state()] * count


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_every_record_is_seen_once_when_the_number_of_hosts_changes(
  dataset: Dataset, cfg: config.Config, packing: bool, after: int
) -> None:
  cfg = wide(cfg, packing=packing)
  before = hosts(dataset, cfg, 2)
  seen = [step(before) for _ in range(2)]
  state = json.loads(json.dumps(before[1].get_state()))  # any host's, as a checkpoint holds it
  rest = hosts(dataset, cfg, after)
  for stream in rest:
    stream.set_state(state)
  rows_left = state["rows_of_an_epoch"] - 2 * BATCH
  assert 0 < rows_left < state["rows_of_an_epoch"]
  while rows_left > 0:
    batch = step(rest)
    kept = slice(0, rows_left)  # the last batch may reach into the next epoch
    seen.append(jax.tree.map(operator.itemgetter(kept), batch))
    rows_left -= BATCH
  found = [record for batch in seen for record in records(batch)]
  histories = [dataset.history(dataset[i]) for i in range(len(dataset))]
  assert sorted(found) == sorted(h.numeric[: h.n_train].astype(np.float32).tobytes() for h in histories if h.n_train)


@pytest.mark.parametrize("packing", [False, True])
def test_a_restored_stream_goes_on_bit_for_bit(dataset: Dataset, cfg: config.Config, packing: bool) -> None:
  cfg = wide(cfg, packing=packing)
  for count in (1, 2):
    streams = hosts(dataset, cfg, count)
    for _ in range(9):
      step(streams)
    states = [s.get_state() for s in streams]
    restored = hosts(dataset, cfg, count)
    for stream, state in zip(restored, states):
      stream.set_state(state)
    for _ in range(3):
      assert_equal(step(restored), step(streams))
    for stream, state in zip(streams, states):  # back again, after it has gone on
      stream.set_state(state)
    again = hosts(dataset, cfg, count)
    for stream in again:
      stream.set_state(states[0])
    assert_equal(step(streams), step(again))


def test_a_position_holds_for_another_batch_size_that_divides_it(dataset: Dataset, cfg: config.Config) -> None:
  large, small = (wide(cfg, packing=True, batch_rows=rows) for rows in (8, 4))
  stream = iter(training_batches.training_batches(dataset, large))
  next(stream)
  half = iter(training_batches.training_batches(dataset, small))
  half.set_state(stream.get_state())
  both = [next(half), next(half)]
  assert_equal(jax.tree.map(lambda *rows: np.concatenate(rows), *both), next(stream))
  next(half)
  with pytest.raises(DataError, match=r"20 rows, lies within a batch of config\.train\.batch_rows=8"):
    stream.set_state(half.get_state())


def test_a_position_of_other_rows_is_an_error(dataset: Dataset, cfg: config.Config) -> None:
  alone, packed = (iter(training_batches.training_batches(dataset, wide(cfg, packing=p))) for p in (False, True))
  with pytest.raises(DataError, match=r"one of other rows \(position.packing: True → False; position.rows_of_an_epoch"):
    alone.set_state(packed.get_state())
  with pytest.raises(DataError, match=r"position\.seed: 0 → 5"):
    iter(training_batches.training_batches(dataset, wide(cfg, packing=False), seed=5)).set_state(alone.get_state())
  with pytest.raises(DataError, match=r"has the parts \['next_index'\].*written by another version"):
    alone.set_state({"next_index": 3})


def test_a_batch_that_does_not_divide_over_the_hosts_is_an_error(dataset: Dataset, cfg: config.Config) -> None:
  with pytest.raises(ConfigError, match=r"config\.train\.batch_rows=8 must be a multiple of the 3 hosts"):
    training_batches.training_batches(dataset, cfg, shard=(0, 3))
  with pytest.raises(ValueError, match=r"shard=\(2, 2\)"):
    training_batches.training_batches(dataset, cfg, shard=(2, 2))


def test_a_dataset_can_be_sent_to_another_process(dataset: Dataset) -> None:
  there = pickle.loads(pickle.dumps(dataset))
  assert len(there) == len(dataset)
  np.testing.assert_array_equal(there[3]["time"], dataset[3]["time"])


@pytest.mark.nightly
@pytest.mark.slow
def test_worker_processes_make_the_same_batches(dataset: Dataset, cfg: config.Config) -> None:
  cfg = wide(cfg, packing=True)
  plain = iter(training_batches.training_batches(dataset, cfg))
  worked = iter(training_batches.training_batches(dataset, cfg, workers=2))
  for _ in range(5):
    assert_equal(next(worked), next(plain))
  assert worked.get_state() == plain.get_state()
  # Arrays in the workers' shared memory would be left behind at the end of the process.
  assert {type(leaf) for leaf in jax.tree.leaves(next(worked))} == {np.ndarray}
  worked.close()
  back = iter(training_batches.training_batches(dataset, cfg, workers=2))
  back.set_state(plain.get_state())
  assert_equal(next(back), next(plain))
  back.close()


class Dying:
  """The batches of a stream, until a worker dies; makes do without a process."""

  def __init__(self, batches: Iterator[Batch], left: int):
    self._batches, self._left, self.closed = batches, left, False

  def __next__(self) -> Batch:
    assert not self.closed
    self._left -= 1
    if self._left < 0:
      raise RuntimeError("Grain worker process 0 was terminated unexpectedly with exit code -9.\nIts last words")
    return next(self._batches)

  def close(self) -> None:
    self.closed = True


def test_batches_go_on_where_a_worker_died(
  dataset: Dataset, cfg: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
  start, started = resumable_stream.BatchStream.start, []

  def dying(self: resumable_stream.BatchStream[Batch], batch: int, workers: int) -> Iterator[Batch]:
    started.append((batch, workers))
    return Dying(start(self, batch, 0), 3)

  monkeypatch.setattr(resumable_stream.BatchStream, "start", dying)
  monkeypatch.setattr(resumable_stream, "MOST_DEATHS", 2)
  worked = iter(training_batches.training_batches(dataset, cfg, workers=2))
  alone = start(worked._stream, 0, 0)
  with messages() as said:
    for _ in range(9):
      assert_equal(next(worked), next(alone))
  assert started == [(0, 2), (3, 2), (6, 2)]
  assert len(said) == 2 and all("a worker that makes batches died" in s and "take up its work" in s for s in said)
  with pytest.raises(DataError, match=r"died 3 times \(.* exit code -9\).*lower config\.train\.workers=2"):
    next(worked)
  assert worked.get_state()["rows"] == 9 * cfg.train.batch_rows


def test_an_error_of_a_batch_is_no_death_of_a_worker(
  dataset: Dataset, cfg: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
  def failing(self: resumable_stream.BatchStream[Batch], batch: int, workers: int) -> Iterator[Batch]:
    raise RuntimeError("a record is damaged")

  monkeypatch.setattr(resumable_stream.BatchStream, "start", failing)
  with pytest.raises(RuntimeError, match="a record is damaged"):
    next(iter(training_batches.training_batches(dataset, cfg, workers=2)))


def kill_a_worker() -> None:
  """Ends one of this process' workers as a system without memory does."""
  workers = [p for p in multiprocessing.active_children() if p.pid is not None]
  assert workers
  os.kill(workers[0].pid or 0, signal.SIGKILL)


@pytest.mark.nightly
@pytest.mark.slow
def test_when_a_worker_dies_others_take_up_its_work(
  dataset: Dataset, cfg: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
  alone = iter(training_batches.training_batches(dataset, cfg))
  worked = iter(training_batches.training_batches(dataset, cfg, workers=2))
  for _ in range(3):
    assert_equal(next(alone), next(worked))
  with messages() as said:
    kill_a_worker()
    for _ in range(12):  # beyond what was made ahead
      assert_equal(next(alone), next(worked))
  assert len(said) == 1 and "a worker that makes batches died" in said[0] and "take up its work" in said[0]
  monkeypatch.setattr(resumable_stream, "MOST_DEATHS", 1)
  kill_a_worker()
  with pytest.raises(DataError, match=r"died 2 times .*lower config\.train\.workers=2"):
    for _ in range(12):
      next(worked)
  worked.close()
