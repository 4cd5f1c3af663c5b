"""Questions: each snapshot, or each user at each time, once; rows of any length say what a row of full length says."""

from __future__ import annotations

import itertools

import grain
import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset import snapshot_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.snapshot_batches import QueryBatch, QueryReader
from supermoe_jax.data.dataset.windows import BlockWindows, window
from supermoe_jax.data.encoding.splits import SPLITS, VALIDATION

DAYS = [config.parse_time(t, "") for t in ("2024-01-10", "2024-03-01", "2024-05-20")]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_questions_cover_a_split_once_and_see_the_last_events_before_the_snapshot(
  dataset: Dataset, cfg: config.Config, split: str
) -> None:
  asked = 0
  for batch in snapshot_batches.query_batches(dataset, cfg, split=SPLITS[split]):
    assert len(batch.features.length) == cfg.evaluate.batch_rows
    for row, question in enumerate(batch.questions):
      record = dataset[question.user]
      n = int(np.sum(record["time"] < question.time))
      kept = min(n, cfg.model.max_events)
      assert (question.n_events, batch.features.length[row]) == (n, kept)
      np.testing.assert_array_equal(batch.features.codes[row, :kept], record["codes"][n - kept : n])
      assert batch.labels["quiet"].known[row] == record["known_quiet"][question.snapshot]
    asked += len(batch.questions)
    assert not batch.features.query_valid[len(batch.questions) :].any()
  assert asked == dataset.manifest["snapshots"][split]


@pytest.mark.parametrize("most", [5, 70, 10**6])
def test_bounded_questions_are_a_sample_of_all_that_is_the_same_each_time(
  dataset: Dataset, cfg: config.Config, most: int
) -> None:
  def asked(cfg: config.Config, most: int) -> list[tuple[int, int]]:
    found = snapshot_batches.query_batches(dataset, cfg, split=VALIDATION, most=most)
    return [(q.user, q.snapshot) for batch in found for q in batch.questions]

  every, some = asked(cfg, 0), asked(cfg, most)
  assert len(set(some)) == len(some) == min(most, len(every)) and set(some) <= set(every)
  assert len(every) > 5 and some == asked(cfg, most)
  if most == 5:
    assert set(some) != set(every[:5])
    assert some != asked(config.override(cfg, ["--config.train.seed=7"]), most)


def test_rows_of_a_block_are_those_of_each_user_alone(dataset: Dataset, cfg: config.Config) -> None:
  """Bit by bit, aggregates included: windows that are cut, whole histories, and times within them."""
  users = np.arange(len(dataset))
  block = dataset.histories(users)
  windows = BlockWindows(dataset, block)
  for day in DAYS:
    n_events = block.before(users, day)
    asked = np.flatnonzero(n_events)
    found = windows(asked, np.full(len(asked), day), n_events[asked], cfg.model.max_events)
    for row, user in enumerate(asked.tolist()):
      history, n = dataset.history(dataset[user]), n_events[user : user + 1].astype(np.int32)
      start = max(0, int(n[0]) - cfg.model.max_events)
      alone = window(dataset, history, start, int(n[0]), np.array([day]), n, cfg.model.max_events, 1)
      for name, one, other in zip(alone._fields, found, alone):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one[row], other, err_msg=name)


def asked_at(dataset: Dataset, cfg: config.Config, lengths: tuple[int, ...]) -> tuple[list[QueryBatch], QueryReader]:
  reader = QueryReader(dataset, cfg, grain.MapDataset.range(len(dataset)), times=DAYS, row_lengths=lengths)
  batches = []
  while True:
    reader.fill()
    length = snapshot_batches.next_length(reader.lengths, reader.waiting()[None])
    if length is None:
      return batches, reader
    batches.append(reader.take(length))


def test_rows_share_a_batch_with_those_of_their_length(dataset: Dataset, cfg: config.Config) -> None:
  """A batch holds as many events whatever its length; only when all is read are longer ones filled with shorter."""
  lengths = (6, 12, 24)
  batches, reader = asked_at(dataset, cfg, lengths)
  assert {b.features.segment.shape for b in batches} <= {(16 * 24 // n, n) for n in lengths}
  full = [b for b in batches if len(b.questions) == len(b.features.segment)]
  for batch in full[:2]:
    length = batch.features.segment.shape[1]
    least = max((n for n in lengths if n < length), default=0)
    assert all(least < min(q.n_events, 24) <= length for q in batch.questions)
  whole = {
    (q.user, q.time): row for b in asked_at(dataset, cfg, (24,))[0] for row, q in zip(zip(*b.features), b.questions)
  }
  assert reader.ended and reader.read == len(dataset)
  assert sum(len(b.questions) for b in batches) == len(whole) == 3 * len(dataset) - len(reader.absent)
  for batch in batches:
    n = len(batch.questions)
    assert not batch.features.query_valid[n:].any() and not batch.features.segment[n:].any()
    for row, question in zip(zip(*batch.features), batch.questions):
      for name, one, other in zip(batch.features._fields, row, whole[question.user, question.time]):
        part = other if name.startswith("query_") else other[: len(one)]
        np.testing.assert_array_equal(one, part, err_msg=name)


def test_users_without_an_event_are_told(dataset: Dataset, cfg: config.Config) -> None:
  _, reader = asked_at(dataset, cfg, ())
  first = [int(dataset[i]["time"][0]) for i in range(len(dataset))]
  assert sorted((a.user, a.time, a.first_event) for a in reader.absent) == sorted(
    (i, t, first[i]) for i, t in itertools.product(range(len(dataset)), DAYS) if first[i] >= t
  )
  assert reader.absent


def test_lengths_halve_down_to_the_shortest_with_three_quarters_between() -> None:
  assert snapshot_batches.row_lengths(256) == (16, 24, 32, 48, 64, 96, 128, 192, 256)
  assert snapshot_batches.row_lengths(100) == (25, 37, 50, 75, 100)
  assert snapshot_batches.row_lengths(20) == (20,)


def test_a_length_is_worth_its_program_where_many_rows_have_it(
  dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
  among, shown = (16, 32, 64), np.array([10, 20, 60, 60])
  assert snapshot_batches.chosen_lengths(shown, among, 1.0) == (64,)
  # Of each four rows 16 spares 48 events and 32 spares 64; beside 32, 16 spares another 16.
  most = snapshot_batches.PROGRAM_EVENTS
  assert snapshot_batches.chosen_lengths(shown, among, most / 64) == (32, 64)
  assert snapshot_batches.chosen_lengths(shown, among, most / 63.9 / 4) == (64,)
  assert snapshot_batches.chosen_lengths(shown, among, most / 16) == among
  assert snapshot_batches.worthwhile_lengths(dataset, 64, DAYS) == (64,)
  monkeypatch.setattr(snapshot_batches, "PROGRAM_EVENTS", 200)
  assert set(snapshot_batches.worthwhile_lengths(dataset, 64, [None])) > {64}


@pytest.mark.parametrize(
  ("waiting", "length"),
  [
    ([[0.5, 0.2]], 8),  # all have ended: the longest first
    ([[0.5, 0.0]], 4),
    ([[1.0, 0.9]], 4),  # one is full
    ([[1.2, 3.0]], 8),
    ([[1.0, 0.0], [0.2, 1.1]], 4),  # of two processes that could each fill another, the one of which more waits
    ([[0.0, 0.0], [0.0, 0.3]], 8),  # one process has nothing left
    ([[0.0, 0.0]], None),
  ],
)
def test_the_next_length_is_that_of_which_most_waits(waiting: list[list[float]], length: int | None) -> None:
  assert snapshot_batches.next_length((4, 8), np.array(waiting)) == length
