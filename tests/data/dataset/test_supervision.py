"""Every kind of task, from files to batches: targets, sample spaces, missing labels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.batch import FIRST_VALUE, UNKNOWN, Targets
from supermoe_jax.data.dataset import snapshot_batches, training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.supervision import Supervision, count_spaces, join_targets
from supermoe_jax.data.encoding.histories import UserHistory
from supermoe_jax.data.encoding.splits import SPLITS, TEST, TRAIN
from tests.fixtures.every_kind_log import SEGMENTS, M

Site = tuple[float, float] | None  # value and weight; None unknown


def plain_event(data: Dataset, history: UserHistory, ratings: list[float | None], i: int) -> dict[str, Site]:
  """What each event label of the config knows about event i of a user."""
  values = data.encoders.categorical["click"].values
  code = int(history.codes[i, 0])
  clicked = None if code == 0 else values[code - 2] == "yes"
  rating = ratings[i]
  good = None if rating is None else rating >= 4
  out: dict[str, Site] = {"click": None if clicked is None else (float(clicked), 1.0)}
  out["good"] = None if good is None or clicked is None else (float(good), 1.0 if clicked else 0.25)
  out["rating"] = (float(history.numeric[i, 0]), 1.0) if good else None
  out["high"] = None if clicked is None or rating is None or rating < 3 else (float(not clicked), 1.0)
  return out


def sites(targets: Targets) -> list[Site]:
  for part in (targets.value, targets.weight):
    assert part.dtype == np.float32
  assert (targets.known == (targets.weight > 0)).all()
  return [(v, w) if k else None for v, k, w in zip(*(p.tolist() for p in targets[:3]))]


@pytest.mark.parametrize("name", ["click", "good", "rating", "high"])
def test_event_labels_equal_a_plain_reference_at_events_and_snapshots(
  data: Dataset, rich: config.Config, raw_rating: dict[str, list[float | None]], name: str
) -> None:
  supervision = Supervision(data, rich, training=True)
  field = {"click": lambda h, i: h.codes[i, 0] > 0, "high": lambda h, i: h.codes[i, 0] > 0}
  carries = field.get(name, lambda h, i: np.isfinite(h.numeric[i, 0]))
  found = 0
  for index in range(len(data)):
    record = data[index]
    history, ratings = data.history(record), raw_rating[record["user"]]
    n_train = history.n_train
    chosen = np.flatnonzero(record["snapshot_split"] == TRAIN)
    row = join_targets([supervision.part(record, history, 0, n_train, chosen)[name]], n_train + 2, len(chosen) + 1)

    carriers = [i for i in range(n_train) if carries(history, i)]
    asked: list[int | None] = [next((c for c in carriers if c > i), None) for i in range(n_train)] + [None, None]
    for n in record["snapshot_events"][chosen]:
      following = [c for c in carriers if c >= n][:M]
      asked += following + [None] * (M - len(following))
    asked += [None] * M
    wanted = [None if i is None else plain_event(data, history, ratings, i)[name] for i in asked]
    assert [s and pytest.approx(s) for s in wanted] == sites(row)
    found += sum(s is not None for s in wanted)
    given = [0 if i is None else int(history.codes[i, 1]) for i in asked]
    assert row.given.tolist() == ([[g] for g in given] if name == "click" else [[]] * len(asked))
  assert found > 20


def test_a_threshold_is_met_by_the_number_itself(data: Dataset, raw_rating: dict[str, list[float | None]]) -> None:
  """Ratings of exactly 4 are `at_least` 4 after log1p and standardising."""
  for index in range(len(data)):
    record = data[index]
    event, label = record["event_good"], record["label_good"]
    for i, value in zip(event[event >= 0], label[event >= 0]):
      rating = raw_rating[record["user"]][i]
      assert rating is not None and value == float(rating >= 4)


def test_snapshot_tasks_equal_a_plain_reference(data: Dataset, rich: config.Config) -> None:
  supervision = Supervision(data, rich, training=True)
  counted = dict.fromkeys(("items", "segment", "age", "young"), 0)
  classes, ages = data.encoders.labels["segment"], data.encoders.labels["age"]
  for index in range(len(data)):
    record = data[index]
    user, history = int(record["user"]), data.history(record)
    chosen = np.flatnonzero(record["snapshot_split"] == TRAIN)
    parts = supervision.part(record, history, 0, 0, chosen)
    row = {n: join_targets([part], 1, len(chosen)) for n, part in parts.items()}
    has_label = user % 3 < 2 and record["user_split"] == TRAIN
    age = 20.0 + user
    for s, at in enumerate(chosen):
      known = {n: bool(t.known[s]) for n, t in row.items() if n in counted or n == "paid"}
      assert known["paid"] == known["age"] == has_label
      assert known["items"] == (bool(record["known_items"][at]) and has_label and user % 2 == 0)
      assert known["segment"] == (has_label and bool(record["known_quiet"][at]) and not record["label_quiet"][at])
      assert known["young"] == (has_label and age < 35)
      assert row["items"].weight[s] == 2.0 * known["items"]
      if known["items"]:
        np.testing.assert_array_equal(row["items"].value[s], record["label_items"][at])
      if known["segment"]:
        assert row["segment"].value.dtype == np.int32
        assert classes.values[row["segment"].value[s]] == SEGMENTS[user % 7 % 3]
      if known["age"]:
        assert row["age"].value[s] == pytest.approx((age - ages.mean) / ages.std, rel=1e-5)
      for name in counted:
        counted[name] += known[name]
  assert min(counted.values()) > 5, counted


def test_batches_have_the_stated_shapes(data: Dataset, rich: config.Config) -> None:
  batch = next(iter(training_batches.training_batches(data, rich)))
  b, events, s = rich.train.batch_rows, rich.model.max_events, rich.train.snapshots_per_row
  assert list(batch.targets) == list(rich.labelled_tasks)
  for name, targets in batch.targets.items():
    task = rich.tasks[name]
    at_events = isinstance(task, (config.NextEvent, config.EventLabel))
    n = s * M if isinstance(task, config.EventLabel) else s
    n += events if at_events else 0
    assert targets.known.shape == targets.weight.shape == (b, n)
    last = {"items": (4,), "next_visit": (2,), "next_search": (2,)}.get(name, ())
    assert targets.value.shape == (b, n, *last)
    assert targets.value.dtype == (np.int32 if name in ("next_item", "next_liked", "segment") else np.float32)
    assert targets.given.shape == (b, n, 1 if name == "click" else 0) and targets.given.dtype == np.int32
    assert np.isfinite(targets.value).all()
  assert (batch.targets["next_item"].weight == 2.0 * batch.targets["next_item"].known).all()
  assert data.schema.outputs == {
    **dict.fromkeys(rich.labelled_tasks, 1),
    "next_item": 6,
    "next_liked": 6,
    "best_rating": 3,
    "items": 4,
    "next_visit": 6,
    "next_search": 4,
    "segment": 3,
  }


@pytest.mark.parametrize("split", ["validation", "test"])
def test_questions_hold_what_is_known_within_the_sample_spaces(
  data: Dataset, rich: config.Config, split: str, raw_rating: dict[str, list[float | None]]
) -> None:
  known = outside = 0
  for batch in snapshot_batches.query_batches(data, rich, split=SPLITS[split]):
    n = len(batch.questions)
    assert list(batch.labels) == list(rich.labelled_tasks)
    assert {k: v.shape for k, v in batch.given.items()} == {
      k: (rich.evaluate.batch_rows, M, 1 if k == "click" else 0) for k in ("click", "good", "rating", "high")
    }
    assert not batch.given["click"][n:].any()
    for row, question in enumerate(batch.questions):
      record = data[question.user]
      history, at = data.history(record), question.snapshot
      for name in ("click", "good", "rating", "high"):
        got, event = batch.labels[name], record[f"event_{name}"][at]
        for j, i in enumerate(event):
          wanted = plain_event(data, history, raw_rating[record["user"]], i)[name] if i >= 0 else None
          if wanted is not None and wanted[1] < 1:  # outside of its sample space: it trains, but is not measured
            outside, wanted = outside + 1, None
          assert (got.value[row, j] if got.known[row, j] else None) == (wanted and pytest.approx(wanted[0]))
          known += wanted is not None
      shown = [int(history.codes[i, 1]) if i >= 0 else 0 for i in record["event_click"][at]]
      assert batch.given["click"][row, :, 0].tolist() == shown
      inside = record["known_paid"][at] and not record["label_paid"][at]
      assert bool(batch.labels["items"].known[row]) == bool(record["known_items"][at] and inside)
  assert known > 10 and outside > 3


def test_the_labels_outside_of_a_sample_space_and_of_unknown_membership_are_counted(
  data: Dataset, rich: config.Config
) -> None:
  found = count_spaces(data, rich)
  assert set(found) == {n for n, t in rich.labelled_tasks.items() if t.sample_space}
  inside = outside = unknown = 0
  for index in range(len(data)):  # items: paid != 1
    record = data[index]
    labelled = (record["snapshot_split"] == TRAIN) & (record["known_items"] > 0)
    told = record["known_paid"] > 0
    inside += int(np.sum(labelled & told & (record["label_paid"] != 1)))
    outside += int(np.sum(labelled & told & (record["label_paid"] == 1)))
    unknown += int(np.sum(labelled & ~told))
  assert found["items"] == (len(data), inside + outside + unknown, inside, outside, unknown)
  assert min(inside, outside, unknown) > 0
  assert found["good"].outside > 0  # it weighs .25, and counts as outside all the same
  assert all(c.labels == c.inside + c.outside + c.unknown for c in found.values())


def test_a_next_event_out_of_vocabulary_is_asked_about_but_not_taught(data: Dataset, rich: config.Config) -> None:
  """No row of the catalogue is right; in evaluation such an answer is wrong, not left out."""
  learning, asking = (Supervision(data, rich, training=training) for training in (True, False))
  taught = outside = 0
  for index in range(len(data)):
    record = data[index]
    history, label = data.history(record), record["label_next_item"].copy()
    codes = history.codes.copy()
    for values in (codes[:, 1], label):
      values[values == FIRST_VALUE] = UNKNOWN
    history, record = dataclasses.replace(history, codes=codes), record | {"label_next_item": label}
    chosen, known = np.arange(len(label)), record["known_next_item"].astype(bool)
    at_snapshots = learning.at_snapshots(record, history, chosen)["next_item"]
    np.testing.assert_array_equal(at_snapshots.known, known & (label > UNKNOWN))
    assert not at_snapshots.weight[label == UNKNOWN].any()
    np.testing.assert_array_equal(asking.at_snapshots(record, history, chosen)["next_item"].known, known)
    at_events = learning.at_events(history, 0, history.n_train)["next_item"]
    assert (at_events.value[at_events.known] > UNKNOWN).all()
    taught, outside = taught + int(at_snapshots.known.sum()), outside + int(np.sum(known & (label == UNKNOWN)))
  assert taught > 20 and outside > 20


def test_embedding_asks_nothing(data: Dataset, rich: config.Config) -> None:
  (batch, *_) = snapshot_batches.query_batches(data, rich, times=[config.parse_time("2024-05-01", "")])
  assert batch.labels == batch.given == batch.seen == {}


def test_a_task_that_is_left_out_still_bounds_the_sample_spaces_of_others(data: Dataset, rich: config.Config) -> None:
  whole = next(iter(training_batches.training_batches(data, rich))).targets
  without = dataclasses.replace(rich, exclude_tasks=("click", "quiet", "same"))
  batch = next(iter(training_batches.training_batches(data, without)))
  assert not {"click", "quiet", "same"} & (set(batch.targets) | set(batch.slices))
  for name in ("good", "segment"):
    np.testing.assert_array_equal(batch.targets[name].weight, whole[name].weight)


def test_missing_labels_can_be_taken_for_negative_at_real_snapshots_only(data: Dataset, rich: config.Config) -> None:
  negative = dataclasses.replace(rich, train=dataclasses.replace(rich.train, missing="negative"))
  masked = next(iter(training_batches.training_batches(data, rich)))
  filled = next(iter(training_batches.training_batches(data, negative)))
  valid = filled.features.query_valid
  assert not valid.all()
  for name in ("quiet", "paid", "age"):
    a, b = masked.targets[name], filled.targets[name]
    assert not a.known[valid].all()
    np.testing.assert_array_equal(b.known, valid)
    np.testing.assert_array_equal(b.value[a.known], a.value[a.known])
    assert not b.value[valid & ~a.known].any()
  # Unknown labels of the task that is compared are 0 as well: paid != 1 is then true.
  np.testing.assert_array_equal(filled.targets["items"].known, valid & (filled.targets["paid"].value != 1))
  for name in ("next_item", "click"):
    np.testing.assert_array_equal(filled.targets[name].known, masked.targets[name].known)
  for one, other in zip(*(snapshot_batches.query_batches(data, c, split=TEST) for c in (rich, negative))):
    for name in one.labels:
      np.testing.assert_array_equal(one.labels[name].known, other.labels[name].known)
