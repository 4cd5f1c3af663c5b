"""Appending files gives what preparing all of them at once gives, under the stated policy for vocabularies."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
import random
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from supermoe_jax import config
from supermoe_jax.data.append import append
from supermoe_jax.data.check import check
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding.vocabulary import Encoders
from supermoe_jax.data.preparation import dated_labels, prepare
from tests.fixtures.grids import quick_few
from tests.fixtures.random_logs import (
  TEMPORAL,
  USERS,
  WAYS,
  Case,
  Row,
  moment,
  random_case,
  random_rows,
  raw_config,
  write_case,
)

KNOWN = ("a", "b", "c", None)  # items that are in every vocabulary, for they are anchors'


def new_rows(seed: int, views: int, buys: int, keep: Callable[[Row], bool]) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
  """Rows of users old and new."""
  rng = random.Random(seed)
  rows = [*random_rows(rng, "views", views, USERS), *random_rows(rng, "buys", buys, USERS)]
  kept = [row for row in rows if keep(row)]
  return tuple(r for r in kept if r.source == "views"), tuple(r for r in kept if r.source == "buys")


def write_rows(folder: pathlib.Path, case: Case, number: int, views: tuple[Row, ...], buys: tuple[Row, ...]) -> None:
  """Writes more files of a case: `views-N-1`, `views-N-2` and `buys-N`."""
  with tempfile.TemporaryDirectory() as name:
    other = pathlib.Path(name)
    write_case(other, dataclasses.replace(case, views=views, buys=buys))
    for half in (1, 2):  # as `write_case` divides the views
      shutil.move(other / f"views-{half}.{case.formats[0]}", folder / f"views-{number}-{half}.{case.formats[0]}")
    shutil.move(other / f"buys-1.{case.formats[1]}", folder / f"buys-{number}.{case.formats[1]}")


def whole_config(folder: pathlib.Path, case: Case, way: str, buys: tuple[int, ...]) -> config.Config:
  raw = raw_config(folder, case, way)
  raw["data"]["sources"]["buys"]["files"] = [str(folder / f"buys-{n}.{case.formats[1]}") for n in buys]
  return config.resolve(raw)


def compare(one: Dataset, two: Dataset) -> None:
  assert len(one) == len(two)
  for i in range(len(one)):
    a, b = one[i], two[i]
    assert a.keys() == b.keys() and a["user"] == b["user"]
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], err_msg=f"{key} of user {a['user']}")


NOT_COMPARED = ("shards", "contents", "digest", "seconds", "appends", "files", "data_hash", "config")


def facts(dataset: Dataset, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
  """What the manifest says, the folder that the files lie in left out."""
  manifest = json.loads(json.dumps(dataset.manifest).replace(str(dataset.path.parent), ""))
  return {k: v for k, v in manifest.items() if k not in (*NOT_COMPARED, *leave_out)}


def appended(folder: pathlib.Path, case: Case, way: str, parts: list[Any], **settings: Any) -> Dataset:
  """Prepares a case and appends the parts, one after the other."""
  folder.mkdir()
  write_case(folder, case)
  cfg = whole_config(folder, case, way, (1,))
  prepare.prepare(cfg)
  for number, (views, buys) in enumerate(parts, 3):
    write_rows(folder, case, number, views, buys)
    files = {"views": [str(folder / f"views-{number}-*.{case.formats[0]}")]}
    files |= {"buys": [str(folder / f"buys-{number}.{case.formats[1]}")]}
    append.append(pathlib.Path(cfg.data.path), files, **settings)
  return Dataset(cfg.data.path)


def at_once(folder: pathlib.Path, case: Case, way: str, parts: list[Any], encoders: Encoders | None = None) -> Dataset:
  """Prepares a case and its parts together, with its own encoders or with these."""
  folder.mkdir()
  write_case(folder, case)
  for number, (views, buys) in enumerate(parts, 3):
    write_rows(folder, case, number, views, buys)
  cfg = whole_config(folder, case, way, (1, *range(3, 3 + len(parts))))
  with pytest.MonkeyPatch.context() as patch:
    if encoders is not None:
      patch.setattr(prepare, "_encoders", lambda log, cfg, labels, path: saved(encoders, path))
      write = dated_labels.write_dated_labels
      patch.setattr(dated_labels, "write_dated_labels", functools.partial(write, encoders=encoders.labels))
    prepare.prepare(cfg)
  return Dataset(cfg.data.path)


def saved(encoders: Encoders, path: pathlib.Path) -> Encoders:
  encoders.save(path)
  return encoders


def append_twice(folder: pathlib.Path, way: str, seed: int, duplicates: str, end: str) -> bool:
  """Rows of any time: every record and every count is that of all files at once, encoded by the first encoders.

  Returns False, and compares nothing, where the seed gives a file without rows.
  """
  case = dataclasses.replace(random_case(seed, 30, 12), duplicates=duplicates, log_end=end, min_count=1)

  def keep(row: Row) -> bool:  # a value out of vocabulary is never a duplicate, by policy
    return duplicates == "keep" or (row.item in KNOWN and row.click != "maybe")

  parts = [new_rows(seed + i, 14, 6, keep) for i in (1, 2)]
  if not all(len(views) > 1 and buys for views, buys in parts):
    return False
  got = appended(folder / "one", case, way, parts, keep_vocabularies=True)
  wanted = at_once(folder / "two", case, way, parts, got.encoders)
  compare(got, wanted)
  # The statistics of aggregates stay those of the first files; which values are hashed is known of these only.
  one, two = (facts(d, ("aggregates", "encoding_hash")) for d in (got, wanted))
  for fields in (one["fields"], two["fields"]):
    for field in fields.values():
      field.pop("values", None), field.pop("colliding", None)
  if duplicates == "keep":  # then some rows hold values out of vocabulary, which are never taken to be equal
    assert one["reading"].pop("duplicate_rows") <= two["reading"].pop("duplicate_rows")
  assert one == two
  check.check_dataset(got.path, sample=20)
  return True


@pytest.mark.parametrize(("number", "way"), list(enumerate(sorted(WAYS))))
def test_appending_twice_is_preparing_once_with_the_first_encoders(
  tmp_path: pathlib.Path, number: int, way: str
) -> None:
  assert append_twice(tmp_path, way, 449, ("drop", "keep")[number % 2], ("", "2024-05-01")[number // 2 % 2])


@pytest.mark.nightly
@settings(max_examples=3, deadline=None)
@example(449, "drop", "")
@given(st.integers(0, 99_999), st.sampled_from(["keep", "drop"]), st.sampled_from(["", "2024-05-01"]))
@pytest.mark.parametrize("way", sorted(WAYS))
def test_appending_random_rows_twice_is_preparing_once_with_the_first_encoders(
  way: str, seed: int, duplicates: str, end: str
) -> None:
  with tempfile.TemporaryDirectory() as name:
    assume(append_twice(pathlib.Path(name), way, seed, duplicates, end))


def append_days(folder: pathlib.Path, way: str, seed: int, end: str, n: int) -> bool:
  """Rows after training need no policy: encoders, statistics and the whole manifest are those of all files at once.

  Returns False, and compares nothing, where the seed gives a file without rows.
  """
  case = dataclasses.replace(random_case(seed, 40, 15), log_end=end)
  until = moment(TEMPORAL["train_end"])  # type: ignore[arg-type]
  parts = [new_rows(seed + i, 20, 9, lambda row: row.time >= until) for i in range(n)]
  if not all(len(views) > 1 and buys for views, buys in parts):
    return False
  got = appended(folder / "one", case, way, parts)
  wanted = at_once(folder / "two", case, way, parts)
  compare(got, wanted)
  one, two = facts(got), facts(wanted)
  # Values out of vocabulary are never taken to be equal.
  assert one["reading"].pop("duplicate_rows") <= two["reading"].pop("duplicate_rows")
  assert one == two
  for a in sorted((wanted.path / "encoders").rglob("*.*")):
    assert a.read_bytes() == (got.path / a.relative_to(wanted.path)).read_bytes()
  return True


@pytest.mark.parametrize(("way", "end", "n"), [("gap", "", 1), ("every_events", "2024-05-01", 2)])
def test_days_after_the_training_period_leave_nothing_different(
  tmp_path: pathlib.Path, way: str, end: str, n: int
) -> None:
  assert append_days(tmp_path, way, 3, end, n)


@pytest.mark.nightly
@settings(max_examples=3, deadline=None)
@given(st.integers(0, 99_999), st.sampled_from(["", "2024-05-01"]), st.integers(1, 3))
@pytest.mark.parametrize("way", ["calendar", "gap", "every_events", "end"])
def test_random_days_after_the_training_period_leave_nothing_different(way: str, seed: int, end: str, n: int) -> None:
  with tempfile.TemporaryDirectory() as name:
    assume(append_days(pathlib.Path(name), way, seed, end, n))


@pytest.mark.parametrize(
  ("way", "days"),
  quick_few(
    [("calendar", -20), ("gap", 30), ("user", 30), ("user, every_events", -20)],
    itertools.product(["calendar", "gap", "every_events", "user", "user, every_events"], [-20, 30]),
  ),
)
def test_events_before_the_first_or_after_the_last_move_the_calendar_of_all_users(
  tmp_path: pathlib.Path, way: str, days: int
) -> None:
  case = dataclasses.replace(random_case(1, 30, 12), min_count=1)
  views, buys = new_rows(1, 9, 4, lambda row: row.item in KNOWN and row.click != "maybe")
  shift = days * 86_400_000_000
  parts = [tuple(tuple(dataclasses.replace(row, time=row.time + shift) for row in rows) for rows in (views, buys))]
  got = appended(tmp_path / "one", case, way, parts, keep_vocabularies=True)
  wanted = at_once(tmp_path / "two", case, way, parts, got.encoders)
  compare(got, wanted)
  for key in ("tally", "snapshots_with_too_few_events", "repeated_snapshots", "events_by_period", "labels", "log"):
    assert got.manifest[key] == wanted.manifest[key]
