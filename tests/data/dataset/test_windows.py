"""What rows hold besides labels: no hidden field, and contrast slices of the own past only."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib

import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset import snapshot_batches, training_batches, windows
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding.histories import UserHistory
from supermoe_jax.data.encoding.splits import TEST
from supermoe_jax.data.preparation import prepare
from supermoe_jax.errors import ConfigError
from tests.fixtures.every_kind_log import raw_config


def test_fields_that_are_no_inputs_are_hidden_from_features_and_aggregates(data: Dataset, rich: config.Config) -> None:
  assert data.schema.inputs == ("item",) and data.schema.numeric_inputs == (1,)
  assert list(data.schema.categorical) == ["click", "item"] and data.schema.numeric == ("rating", "shown")
  names = data.aggregator.names
  assert any("mean shown" in n for n in names) and not any("rating" in n for n in names)
  (batch, *_) = snapshot_batches.query_batches(data, rich, split=TEST)
  n = len(batch.questions)
  for features in (next(iter(training_batches.training_batches(data, rich))).features, batch.features._replace()):
    assert not features.codes[..., 0].any() and features.codes[..., 1].any()
    assert not np.isfinite(features.numeric[:n, ..., 0]).any() and np.isfinite(features.numeric[:n, ..., 1]).any()


def phases(time: int) -> list[float]:
  """Sine of the phases of day, week and year, then cosine."""
  angles = [2 * math.pi * math.fmod(time / (days * 86_400e6), 1.0) for days in (1, 7, 365.2425)]
  return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


@pytest.mark.parametrize("start", [0, 3])
def test_features_are_what_the_history_says_in_plain_numbers(dataset: Dataset, start: int) -> None:
  index = next(i for i in range(len(dataset)) if len(dataset[i]["time"]) > 12)
  record = dataset[index]
  history, stop = dataset.history(record), 9
  times = np.array([history.time[6] + 1, history.time[8] + 86_400_000_000])
  seen = np.array([7, 9], np.int32)
  found = windows.window(dataset, history, start, stop, times, seen, 12, 3)
  n, hour = stop - start, 3_600_000_000
  assert found.segment.tolist() == [1] * n + [0] * (12 - n) and found.query_segment.tolist() == [1, 1, 0]
  assert (int(found.length), found.query_valid.tolist()) == (n, [True, True, False])
  assert found.query_events.tolist() == [7 - start, 9 - start, 0]
  assert found.source[:n].tolist() == (record["source"][start:stop] + 1).tolist()
  np.testing.assert_array_equal(found.codes[:n], record["codes"][start:stop])
  np.testing.assert_array_equal(found.numeric[:n], record["numeric"][start:stop])
  assert np.isnan(found.numeric[n:]).all() and not found.codes[n:].any() and not found.source[n:].any()
  time = history.time.tolist()
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  close(found.time[:n], [(time[i] - time[start]) / hour for i in range(start, stop)])
  close(found.gap[:n], [(time[i] - time[max(i - 1, 0)]) / hour for i in range(start, stop)])
  close(found.calendar[:n], [phases(time[i]) for i in range(start, stop)])
  close(found.query_time[:2], [(t - time[start]) / hour for t in times.tolist()])
  close(found.query_gap[:2], [1 / hour, 24.0])
  close(found.query_calendar[:2], [phases(t) for t in times.tolist()])
  aggregates = dataset.aggregates(history.block, np.zeros(2, np.int64), times, seen)
  np.testing.assert_array_equal(found.query_aggregates, np.pad(aggregates, ((0, 1), (0, 0))))


def test_counting_the_values_of_a_hidden_field_is_an_error(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  raw = raw_config(folder)
  raw["data"]["path"] = str(tmp_path / "dataset")
  raw["data"]["aggregates"]["fields"] = ["click"]
  with pytest.raises(ConfigError, match=r"aggregates\.fields holds 'click', which the model must not see"):
    prepare.prepare(config.resolve(raw))


# ------------------------------------------------------------------------------------------------------------- contrast


def test_slices_hold_events_of_the_users_own_training_history_only(data: Dataset, rich: config.Config) -> None:
  task = rich.tasks["same"]
  assert isinstance(task, config.Contrast)
  one_row = dataclasses.replace(rich, train=dataclasses.replace(rich.train, batch_rows=1))
  stream = iter(training_batches.training_batches(data, one_row))
  seen, lengths = 0, set()
  starts = [(r, data.history(r)) for r in (data[i] for i in range(len(data)))]
  for _ in range(2 * len(data)):
    batch = next(stream)
    slices = batch.slices["same"]
    features = slices.features
    assert features.codes.shape == (1, 2, task.slice_events, 2) and features.query_valid.shape == (1, 2, 1)
    assert not features.query_aggregates.any() and features.query_aggregates.shape[-1] == data.schema.aggregates
    # The row's own window says whose row it is; here a user's training events end it.
    n = int(batch.features.length[0])
    owners = [
      h
      for _, h in starts
      if h.n_train >= n
      and (h.n_train > task.slice_events or h.n_train == n)
      and np.array_equal(windowed(h, h.n_train - n, h.n_train), batch.features.codes[0, :n, 1])
    ]
    if not slices.known[0]:
      assert not features.length.any() and not features.query_valid.any() and n < 2 * task.least_events
      continue
    for k in range(2):
      length = int(features.length[0, k])
      lengths.add(length)
      assert task.least_events <= length <= task.slice_events
      assert features.query_valid[0, k, 0] and features.query_events[0, k, 0] == length
      assert features.gap[0, k, 0] == 0 and 0 <= features.query_gap[0, k, 0] < 1e-6
      hours = features.time[0, k, :length]
      if owners:
        assert any(
          np.allclose((h.time[i : i + length] - h.time[i]) / 3.6e9, hours, atol=1e-3)
          and np.array_equal(windowed(h, i, i + length), features.codes[0, k, :length, 1])
          for h in owners
          for i in range(h.n_train - length + 1)
        )
        seen += 1
  assert seen > 20 and len(lengths) > 4


def windowed(history: UserHistory, start: int, stop: int) -> np.ndarray:
  """The codes of the items of some events."""
  return history.codes[start:stop, 1]


def test_a_contrast_task_does_not_change_the_rows(data: Dataset, rich: config.Config) -> None:
  whole = next(iter(training_batches.training_batches(data, rich))).features
  alone = next(
    iter(training_batches.training_batches(data, dataclasses.replace(rich, exclude_tasks=("same",))))
  ).features
  for a, b in zip(whole, alone):
    np.testing.assert_array_equal(a, b)
