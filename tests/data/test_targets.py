"""Every kind of task, from files to batches: targets, sample spaces, contrast slices, and fields that stay hidden."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import config
from supermoe_jax.data import batches, prepare
from supermoe_jax.data import labels as labels_lib
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.data.events import DataError, UserHistory
from supermoe_jax.data.targets import Supervision, Targets

M = 3  # events that a snapshot of an event label asks about
SEGMENTS = ("one", "two", "three")


def write_files(folder: pathlib.Path, users: int = 30) -> None:
  """Items shown, with clicks and ratings of some, searches in between that have neither, and a table of most users."""
  rng = np.random.default_rng(5)
  shows: list[tuple] = []
  searches: list[tuple] = []
  for user in range(users):
    for second in np.sort(rng.integers(0, 150 * 86_400, int(rng.integers(3, 40)))):
      time = np.datetime64("2024-01-01") + np.timedelta64(int(second), "s")
      if rng.random() < 0.3:
        searches.append((user, time))
        continue
      click = [None, "yes", "no", "no"][int(rng.integers(4))]
      rating = float(rng.integers(1, 6)) if rng.random() < 0.7 else None
      shows.append((user, time, f"item{rng.integers(6)}", click, rating))
  names = ("user", "time", "item", "click", "rating")
  pq.write_table(pa.table(dict(zip(names, map(list, zip(*shows))))), folder / "shows.parquet")
  pq.write_table(pa.table(dict(zip(("user", "time"), map(list, zip(*searches))))), folder / "searches.parquet")
  known = list(range(0, users, 3)) + list(range(1, users, 3))
  table = {
    "user": known,
    "plan": [["free", "paid"][u % 2] for u in known],
    "segment": [SEGMENTS[u % 7 % 3] for u in known],
    "age": [20.0 + u for u in known],
  }
  pq.write_table(pa.table(table), folder / "users.parquet")


def raw_config(folder: pathlib.Path) -> dict[str, Any]:
  who = {"user": "user", "time": "time"}
  return {
    "data": {
      "path": str(folder / "dataset"),
      "sources": {
        "shows": {"files": [str(folder / "shows.parquet")], **who},
        "searches": {"files": [str(folder / "searches.parquet")], **who},
      },
      "fields": {
        "click": {"sources": ["shows"], "input": False},
        "item": {"sources": ["shows"]},
        "rating": {"sources": ["shows"], "kind": "numeric", "encoding": "log1p", "input": False},
        "shown": {"sources": ["shows"], "kind": "numeric", "column": "rating"},
      },
      "users": {"files": [str(folder / "users.parquet")], "user": "user"},
      "split": {
        "train_end": "2024-04-15",
        "validation": ["2024-04-16"],
        "test": ["2024-05-05"],
        "every_days": 12.0,
        "user_validation": 0.2,
      },
      "aggregates": {"top_values": 2, "fields": ["item"]},
    },
    "tasks": {
      "next_item": {"kind": "next_event", "field": "item", "in_space_weight": 2.0},
      "click": {"kind": "event_label", "field": "click", "positive": ["yes"], "given": ["item"], "per_snapshot": M},
      "good": {
        "kind": "event_label",
        "field": "rating",
        "at_least": 4.0,
        "per_snapshot": M,
        "sample_space": "click == 1",
        "out_space_weight": 0.25,
      },
      "rating": {"kind": "event_label", "field": "rating", "per_snapshot": M, "sample_space": "good == 1"},
      "high": {
        "kind": "event_label",
        "field": "click",
        "positive": ["no"],
        "per_snapshot": M,
        "sample_space": "rating >= 3",
      },
      "quiet": {"kind": "future_event", "source": "shows", "horizon_days": 20.0, "negate": True},
      "items": {
        "kind": "future_values",
        "field": "item",
        "top": 4,
        "horizon_days": 10.0,
        "sample_space": "paid != 1",
        "in_space_weight": 2.0,
      },
      "paid": {"kind": "user_label", "column": "plan", "positive": ["paid"]},
      "segment": {"kind": "user_label", "column": "segment", "type": "multiclass", "sample_space": "quiet == 0"},
      "age": {"kind": "user_label", "column": "age", "type": "regression"},
      "young": {"kind": "user_label", "column": "plan", "positive": ["free"], "sample_space": "age < 35"},
      "same": {"kind": "contrast", "slice_events": 9, "least_events": 3},
    },
    "model": {"d_model": 16, "heads": 2, "d_hidden": 16, "d_expert": 16, "experts": 4, "max_events": 16},
    "train": {"steps": 4, "warmup_steps": 1, "batch_rows": 8, "snapshots_per_row": 8},
    "evaluate": {"batch_rows": 16},
  }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("rich")
  write_files(folder)
  return folder


@pytest.fixture(scope="module")
def rich(folder: pathlib.Path) -> config.Config:
  return config.resolve(raw_config(folder))


@pytest.fixture(scope="module")
def data(rich: config.Config) -> Dataset:
  prepare.prepare(rich, say=lambda text: None)
  return Dataset(rich.data.path)


@pytest.fixture(scope="module")
def raw_rating(folder: pathlib.Path) -> dict[str, list[float | None]]:
  """Of each user the ratings of the events in the file, in order."""
  shows = pq.read_table(folder / "shows.parquet").to_pydict()
  searches = pq.read_table(folder / "searches.parquet").to_pydict()
  events = [(str(u), t, 0, r) for u, t, r in zip(shows["user"], shows["time"], shows["rating"])]
  events += [(str(u), t, 1, None) for u, t in zip(searches["user"], searches["time"])]
  out: dict[str, list[float | None]] = {}
  for user, _, _, rating in sorted(events, key=lambda e: e[:3]):
    out.setdefault(user, []).append(rating)
  return out


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
    chosen = np.flatnonzero(record["snapshot_split"] == labels_lib.TRAIN)
    row = supervision.row(record, history, 0, n_train, chosen, n_train + 2, len(chosen) + 1)[name]

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
    chosen = np.flatnonzero(record["snapshot_split"] == labels_lib.TRAIN)
    row = supervision.row(record, history, 0, 0, chosen, 1, len(chosen))
    has_label = user % 3 < 2 and record["user_split"] == labels_lib.TRAIN
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
  batch = next(iter(batches.training(data, rich)))
  b, events, s = rich.train.batch_rows, rich.model.max_events, rich.train.snapshots_per_row
  assert list(batch.targets) == list(rich.labelled_tasks)
  for name, targets in batch.targets.items():
    task = rich.tasks[name]
    at_events = isinstance(task, config.AT_EVENTS)
    n = s * M if isinstance(task, config.EventLabel) else s
    n += events if at_events else 0
    assert targets.known.shape == targets.weight.shape == (b, n)
    assert targets.value.shape == ((b, n, 4) if name == "items" else (b, n))
    assert targets.value.dtype == (np.int32 if name in ("next_item", "segment") else np.float32)
    assert targets.given.shape == (b, n, 1 if name == "click" else 0) and targets.given.dtype == np.int32
    assert np.isfinite(targets.value).all()
  assert (batch.targets["next_item"].weight == 2.0 * batch.targets["next_item"].known).all()
  assert data.schema.outputs == {
    **dict.fromkeys(rich.labelled_tasks, 1),
    "next_item": 6,
    "items": 4,
    "segment": 3,
  }


@pytest.mark.parametrize("split", ["validation", "test"])
def test_questions_hold_what_is_known_within_the_sample_spaces(
  data: Dataset, rich: config.Config, split: str, raw_rating: dict[str, list[float | None]]
) -> None:
  known = 0
  for batch in batches.questions(data, rich, split=labels_lib.SPLITS[split]):
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
          assert (got.value[row, j] if got.known[row, j] else None) == (wanted and pytest.approx(wanted[0]))
          known += wanted is not None
      shown = [int(history.codes[i, 1]) if i >= 0 else 0 for i in record["event_click"][at]]
      assert batch.given["click"][row, :, 0].tolist() == shown
      inside = record["known_paid"][at] and not record["label_paid"][at]
      assert bool(batch.labels["items"].known[row]) == bool(record["known_items"][at] and inside)
  assert known > 10


def test_embedding_asks_nothing(data: Dataset, rich: config.Config) -> None:
  (batch, *_) = batches.questions(data, rich, times=[config.parse_time("2024-05-01", "")])
  assert batch.labels == batch.given == batch.seen == {}


def test_a_task_that_is_left_out_still_bounds_the_sample_spaces_of_others(data: Dataset, rich: config.Config) -> None:
  whole = next(iter(batches.training(data, rich))).targets
  without = dataclasses.replace(rich, exclude_tasks=("click", "quiet", "same"))
  batch = next(iter(batches.training(data, without)))
  assert not {"click", "quiet", "same"} & (set(batch.targets) | set(batch.slices))
  for name in ("good", "segment"):
    np.testing.assert_array_equal(batch.targets[name].weight, whole[name].weight)


def test_missing_labels_can_be_taken_for_negative_at_real_snapshots_only(data: Dataset, rich: config.Config) -> None:
  negative = dataclasses.replace(rich, train=dataclasses.replace(rich.train, missing="negative"))
  masked = next(iter(batches.training(data, rich)))
  filled = next(iter(batches.training(data, negative)))
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
  for one, other in zip(*(batches.questions(data, c, split=labels_lib.TEST) for c in (rich, negative))):
    for name in one.labels:
      np.testing.assert_array_equal(one.labels[name].known, other.labels[name].known)


# ------------------------------------------------------------------------------------------- what the model may not see


def test_fields_that_are_no_inputs_are_hidden_from_features_and_aggregates(data: Dataset, rich: config.Config) -> None:
  assert data.schema.inputs == ("item",) and data.schema.numeric_inputs == (1,)
  assert list(data.schema.categorical) == ["click", "item"] and data.schema.numeric == ("rating", "shown")
  names = data.aggregator.names
  assert any("mean shown" in n for n in names) and not any("rating" in n for n in names)
  (batch, *_) = batches.questions(data, rich, split=labels_lib.TEST)
  n = len(batch.questions)
  for features in (next(iter(batches.training(data, rich))).features, batch.features._replace()):
    assert not features.codes[..., 0].any() and features.codes[..., 1].any()
    assert not np.isfinite(features.numeric[:n, ..., 0]).any() and np.isfinite(features.numeric[:n, ..., 1]).any()


def test_counting_the_values_of_a_hidden_field_is_an_error(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  raw = raw_config(folder)
  raw["data"]["path"] = str(tmp_path / "dataset")
  raw["data"]["aggregates"]["fields"] = ["click"]
  with pytest.raises(config.ConfigError, match=r"aggregates\.fields holds 'click', which the model must not see"):
    prepare.prepare(config.resolve(raw), say=lambda text: None)


# ------------------------------------------------------------------------------------------------------------- contrast


def test_slices_hold_events_of_the_users_own_training_history_only(data: Dataset, rich: config.Config) -> None:
  task = rich.tasks["same"]
  assert isinstance(task, config.Contrast)
  one_row = dataclasses.replace(rich, train=dataclasses.replace(rich.train, batch_rows=1))
  stream = iter(batches.training(data, one_row))
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
  whole = next(iter(batches.training(data, rich))).features
  alone = next(iter(batches.training(data, dataclasses.replace(rich, exclude_tasks=("same",))))).features
  for a, b in zip(whole, alone):
    np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------------------------------------------- manifest


def test_the_manifest_counts_every_kind(data: Dataset) -> None:
  records = [data[i] for i in range(len(data))]
  for split, index in labels_lib.SPLITS.items():
    here = [r["snapshot_split"] == index for r in records]

    def values(name: str, here: list[np.ndarray] = here) -> np.ndarray:
      return np.concatenate([r[f"label_{name}"][s][r[f"known_{name}"][s] > 0] for r, s in zip(records, here)])

    counts = {n: splits[split] for n, splits in data.manifest["labels"].items()}
    assert set(counts) == set(data.config.labelled_tasks)
    for name in ("click", "good", "quiet", "paid"):
      assert counts[name] == {"known": len(values(name)), "positive": int(values(name).sum())}
    by_class = np.bincount(values("segment"), minlength=3).tolist()
    assert counts["segment"]["classes"] == dict(zip(data.encoders.labels["segment"].values, by_class))
    for name in ("rating", "age"):
      assert counts[name]["known"] == len(values(name)) > 0
      moments = (values(name).mean(), values(name).std())
      assert (counts[name]["mean"], counts[name]["std"]) == pytest.approx(moments, rel=1e-4, abs=1e-6)
  rates = data.manifest["label_rates"]
  assert set(rates) == set(data.config.labelled_tasks) - {"next_item"}
  assert sum(rates["segment"]) == pytest.approx(1) and len(rates["items"]) == 4
  text = prepare.render(data.manifest)
  assert "segment: train" in text and "standardised" in text


def test_a_misspelt_positive_value_of_an_event_label_is_named(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  raw = raw_config(folder)
  raw["data"]["path"] = str(tmp_path / "dataset")
  raw["tasks"]["click"]["positive"] = ["yess"]
  message = r"tasks\.click\.positive: 'yess' never occurs .* field 'click'.*did you mean 'yes'\? \(it holds 'no', 'yes'"
  with pytest.raises(DataError, match=message):
    prepare.prepare(config.resolve(raw), say=lambda text: None)


def test_a_sample_space_over_classes_that_are_no_numbers_is_an_error(
  folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  raw = raw_config(folder)
  raw["data"]["path"] = str(tmp_path / "dataset")
  raw["tasks"]["age"]["sample_space"] = "segment == 1"
  with pytest.raises(config.ConfigError, match="the classes of segment are not all numbers"):
    prepare.prepare(config.resolve(raw), say=lambda text: None)


def test_leave_one_out_knows_user_and_event_labels(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  raw = raw_config(folder)
  raw["data"] |= {"path": str(tmp_path / "dataset"), "split": {"mode": "leave_one_out"}}
  raw["tasks"] = {n: raw["tasks"][n] for n in ("next_item", "click", "paid", "age")}
  cfg = config.resolve(raw)
  manifest = prepare.prepare(cfg, say=lambda text: None)
  assert all(manifest["labels"][n][s]["known"] for n in ("click", "paid", "age") for s in ("train", "test"))
  for batch in batches.questions(Dataset(cfg.data.path), cfg, split=labels_lib.TEST):
    assert not batch.labels["click"].known[:, 1:].any()
    assert batch.labels["click"].known[:, 0].any()


# ---------------------------------------------------------------------------------------------------------------- cache


def test_records_that_are_kept_are_the_same_and_cannot_be_written_to(data: Dataset) -> None:
  first, again = data[0], data[0]
  assert first is not again and first["time"] is again["time"]
  first["extra"] = 1
  assert "extra" not in data[0]
  with pytest.raises(ValueError, match="read-only"):
    again["codes"][0] = 1


def test_records_beyond_the_room_are_decoded_again(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
  from supermoe_jax.data import dataset as dataset_lib

  size = sum(v.nbytes for v in data[0].values() if isinstance(v, np.ndarray))
  monkeypatch.setattr(dataset_lib, "KEPT_BYTES", size)
  small = Dataset(data.path)
  assert small[0]["time"] is small[0]["time"]
  assert small[1]["time"] is not small[1]["time"]
  np.testing.assert_array_equal(small[1]["time"], data[1]["time"])
