"""`check` finds labels that were made by a fault, and names task, user, snapshot, the wrong and the right value.

A fault is planted in two ways: the dataset is prepared with other settings than those that it is checked with, or the
code that makes labels is changed while the dataset is prepared.
"""

from __future__ import annotations

import ast
import csv
import datetime
import pathlib
import random
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data.check import check
from supermoe_jax.data.check.check import CheckError
from supermoe_jax.data.dataset import supervision
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.preparation import prepare
from supermoe_jax.data.tasks.dated_label import DatedLabelKind
from supermoe_jax.data.tasks.event_label import EventLabelKind
from supermoe_jax.data.tasks.future_amount import FutureAmountKind
from supermoe_jax.data.tasks.future_event import FutureEventKind
from supermoe_jax.data.tasks.future_values import FutureValuesKind
from supermoe_jax.data.tasks.labels import Labels, TaskLabels, future_window
from supermoe_jax.data.tasks.next_event import NextEventKind
from tests.fixtures.basket_log import START, moment_of, random_lines, raw_config, write_lines
from tests.fixtures.shared import made_once

Patch = Callable[[pytest.MonkeyPatch], None]

BIG = "sum(paid) >= 50"
WITHIN = {"horizon_days": 20.0}
GRADES = ("fine", "poor", "bad")


def _tasks(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  dated = {"kind": "dated_label", "files": [str(folder / "answers.csv")], "user": "customer", "time": "asked_on"}
  return {
    "fraud": {**dated, "column": "flag", "delay_days": 6.0},
    "grade": {**dated, "column": "grade", "type": "multiclass"},
    "loss": {**dated, "column": "loss", "type": "regression"},
    "spend": {"kind": "future_amount", "field": "paid", "where": "paid >= 20", **WITHIN},
    "price": {"kind": "future_amount", "field": "paid", "of": "mean", "source": "tills", **WITHIN},
    "dearest": {"kind": "future_amount", "field": "paid", "of": "max", "where": "article == 'wine'", **WITHIN},
    "lines": {"kind": "future_amount", "of": "count", "source": "web", **WITHIN},
    "baskets": {"kind": "future_amount", "of": "moments", "where": BIG, **WITHIN},
    "large": {"kind": "future_event", "where": BIG, **WITHIN},
    "silent": {"kind": "future_event", "source": "tills", "negate": True, "horizon_days": 5.0},
    "wares": {"kind": "future_values", "field": "article", "top": 4, "where": "paid < 20", **WITHIN},
    "then": {"kind": "next_event", "field": "article", "ties": "order", "where": "paid >= 20"},
    "next": {"kind": "next_event", "field": "article", "ties": "set", "where": "count() >= 2"},
    "cheap": {"kind": "event_label", "field": "paid", "at_least": 20.0, "where": "article != 'tea'", "per_snapshot": 3},
    "amount": {"kind": "event_label", "field": "paid", "where": "count() >= 2", "per_snapshot": 2},
  }


def _raw(folder: pathlib.Path, changed: dict[str, dict[str, Any]] | None = None, **split: Any) -> dict[str, Any]:
  tasks = {n: {**task, **(changed or {}).get(n, {})} for n, task in _tasks(folder).items()}
  return raw_config(folder, tasks, **split)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The files of the log, and the dataset that is right; do not change them."""

  def make(folder: pathlib.Path) -> None:
    write_lines(folder, random_lines(17))
    rng = random.Random(3)
    with (folder / "answers.csv").open("w", newline="") as out:
      writer = csv.writer(out)
      writer.writerow(["customer", "asked_on", "flag", "grade", "loss"])
      for i in range(150):
        at = START + datetime.timedelta(minutes=rng.randrange(24 * 60 * 110))
        writer.writerow([f"c{i % 12}", at, rng.choice((0, 1, 1)), rng.choice(GRADES), rng.choice((-3.5, 0, 2, 40))])
    prepare.prepare(config.resolve(_raw(folder)))

  return made_once(tmp_path_factory, "planted_errors", make)


# ----------------------------------------------------------------------------------------------------- faults in code


def _labels(kind: Any, name: str, change: Callable[[Labels], Labels]) -> Patch:
  """Lets a kind of task change the labels of one task."""

  def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kind.label

    def label(self: Any, inputs: Any) -> TaskLabels:
      found = right(self, inputs)
      return found._replace(labels=change(found.labels)) if self.name == name else found

    monkeypatch.setattr(kind, "label", label)

  return patch


def _while_labelling(kind: Any, name: str, function: str, wrong: Callable[..., Any]) -> Patch:
  """Lets a function of the kind's module be another while the kind labels one task."""

  def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    right, module = kind.label, sys.modules[kind.__module__]

    def label(self: Any, inputs: Any) -> TaskLabels:
      with pytest.MonkeyPatch.context() as within:
        if self.name == name:
          within.setattr(module, function, wrong)
        found: TaskLabels = right(self, inputs)
        return found

    monkeypatch.setattr(kind, "label", label)

  return patch


def _window(kind: Any, name: str, shift: tuple[int, int] = (0, 0), censored: bool = True) -> Patch:
  """Moves the windows of a task by some events, or makes labels known beyond the end of their period."""

  def window(block: Any, snapshots: Any, times: Any, days: float) -> Any:
    start, stop, known = future_window(block, snapshots, times, days)
    end = snapshots.time + int(days * MICROSECONDS_PER_DAY)
    start, stop = (np.clip(x + by, 0, len(block.time)) for x, by in zip((start, stop), shift, strict=True))
    return start, np.maximum(start, stop), known if censored else end <= times.observed_until[2]

  return _while_labelling(kind, name, "future_window", window)


def _beyond_the_period(block: Any, snapshots: Any, times: Any) -> np.ndarray:
  return np.asarray(block.offsets[snapshots.user + 1])


def _value(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Labels], Labels]:
  return lambda labels: labels._replace(value=change(labels.value).astype(labels.value.dtype))


# ------------------------------------------------------------------------------------------------------------ the test

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
  "a label is used before it is known": ("fraud", {"delay_days": 0.0}),
  "a column of the table is taken for another": ("fraud", {"column": "grade", "positive": ["poor"]}),
  "numbers of the table are yes and no": ("loss", {"column": "flag"}),
  "a sum without its condition": ("spend", {"where": ""}),
  "a condition takes > for >=": ("spend", {"where": "paid > 20"}),
  "a mean over a shorter horizon": ("price", {"horizon_days": 18.0}),
  "a mean over all sources": ("price", {"source": ""}),
  "a maximum that is a sum": ("dearest", {"of": "sum"}),
  "a count of another source": ("lines", {"source": "tills"}),
  "lines instead of baskets": ("baskets", {"of": "count"}),
  "single lines instead of whole baskets": ("baskets", {"where": "paid >= 50"}),
  "a basket's boundary": ("large", {"where": "sum(paid) > 50"}),
  "a longer horizon": ("silent", {"horizon_days": 6.0}),
  "churn the wrong way round": ("silent", {"negate": False}),
  "values of all events": ("wares", {"where": ""}),
  "a next event of all events": ("then", {"where": ""}),
  "a next moment of all moments": ("next", {"where": ""}),
  "a label of other events": ("cheap", {"where": ""}),
  "a label's boundary": ("cheap", {"at_least": 20.5}),
  "numbers of other baskets": ("amount", {"where": "count() >= 3"}),
}

CODE: dict[str, tuple[str, Patch]] = {
  "yes for no": ("fraud", _labels(DatedLabelKind, "fraud", _value(lambda v: 1 - v))),
  "a shifted class": ("grade", _labels(DatedLabelKind, "grade", _value(lambda v: (v + 1) % len(GRADES)))),
  "a number off by a little": ("loss", _labels(DatedLabelKind, "loss", _value(lambda v: v + 0.001))),
  "the label of another row": ("loss", _labels(DatedLabelKind, "loss", _value(lambda v: np.roll(v, 1)))),
  "a label of no row": (
    "grade",
    _labels(DatedLabelKind, "grade", lambda labels: labels._replace(known=np.ones_like(labels.known))),
  ),
  "the mean of no event": (
    "price",
    _labels(FutureAmountKind, "price", lambda labels: labels._replace(known=np.ones_like(labels.known))),
  ),
  "a window that begins an event late": ("spend", _window(FutureAmountKind, "spend", shift=(1, 0))),
  "a window that ends an event late": ("lines", _window(FutureAmountKind, "lines", shift=(0, 1))),
  "amounts beyond the end of training": ("baskets", _window(FutureAmountKind, "baskets", censored=False)),
  "events beyond the end of training": ("large", _window(FutureEventKind, "large", censored=False)),
  "values beyond the end of training": ("wares", _window(FutureValuesKind, "wares", censored=False)),
  "a next event beyond the end of training": (
    "then",
    _while_labelling(NextEventKind, "then", "last_answer", _beyond_the_period),
  ),
  "labels beyond the end of training": (
    "cheap",
    _while_labelling(EventLabelKind, "cheap", "last_answer", _beyond_the_period),
  ),
}


@pytest.mark.parametrize("fault", [*SETTINGS, *CODE])
def test_a_fault_is_found_with_task_user_snapshot_and_both_values(
  files: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
  name, plant = {**SETTINGS, **CODE}[fault]
  raw = _raw(files, {name: plant} if isinstance(plant, dict) else None)
  raw["data"]["path"] = str(tmp_path / "dataset")
  with monkeypatch.context() as patched:
    if not isinstance(plant, dict):
      plant(patched)
    prepare.prepare(config.resolve(raw))
  wrong, right = Dataset(tmp_path / "dataset"), Dataset(files / "dataset")
  # The dataset is checked with the settings that it should have been made with.
  monkeypatch.setattr(check, "Dataset", lambda path: _with_config(Dataset(path), right))
  with pytest.raises(CheckError) as found:
    check.check_dataset(tmp_path / "dataset")
  said = re.match(
    r"user '(c\d+)', snapshot (\S+) \(.*\), task (\w+)(, all values of the next moment)?: \S+ holds (.*), "
    r"the raw files give (.*)\. Do not train on it",
    str(found.value),
  )
  assert said is not None, found.value
  user, time, task, of_moment, held, given = said.groups()
  assert (task, of_moment) == (name, None)
  wrong_label, right_label = (
    _label(d, right, user, np.datetime64(time, "us").astype(int), name) for d in (wrong, right)
  )
  assert check._equal(_parsed(held), wrong_label) and check._equal(_parsed(given), right_label)
  assert not check._equal(wrong_label, right_label)


def _with_config(dataset: Dataset, right: Dataset) -> Dataset:
  dataset.config, dataset.encoders = right.config, right.encoders
  return dataset


def _parsed(shown: str) -> Any:
  return None if shown == "no label" else ast.literal_eval(shown)


def _label(dataset: Dataset, right: Dataset, user: str, time: int, name: str) -> Any:
  """The label of a dataset as the message shows it; vocabularies and classes are those of the right dataset."""
  (record,) = (r for i in range(len(dataset)) if (r := dataset[i])["user"] == user)
  at = np.flatnonzero(record["snapshot_time"] == time)
  if not len(at):
    return None
  task = right.config.labelled_tasks[name]
  known, value = record[f"known_{name}"][at[-1]], record[f"label_{name}"][at[-1]]
  if task.about_events:
    pairs = zip(record[f"event_{name}"][at[-1]].tolist(), value.tolist(), known, strict=True)
    return tuple((event, v) for event, v, k in pairs if k) or None
  if not known:
    return None
  if task.answer == "multiclass":
    return right.encoders.labels[name].values[value]
  if task.answer not in ("catalogue", "multilabel"):
    return float(value)
  articles = right.encoders.categorical["article"].values
  if task.answer == "catalogue":
    return articles[value - 2]
  return tuple(sorted(v for v, there in zip(articles, value) if there))


@pytest.mark.parametrize("fault", ["a value is missing", "a value is wrong", "values of another moment"])
def test_a_fault_in_the_values_of_a_moment_is_found(
  files: pathlib.Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
  """The loader makes these sets from histories, for training and for evaluation; the first value is right."""
  right = supervision.values_of_moments

  def values(codes: np.ndarray, time: np.ndarray, event: np.ndarray, limit: Any, most: int) -> np.ndarray:
    found = right(codes, time, event, limit, most)
    if fault == "values of another moment":
      later = right(codes, time, np.where(event > 0, event - 1, event), limit, most)
      return np.where(found[..., :1] > 0, np.concatenate([found[..., :1], later[..., 1:]], axis=-1), 0)
    column = found[..., 1:]
    column[...] = 0 if fault == "a value is missing" else np.where(column > 0, 2 + (column - 1) % 5, 0)
    return found

  monkeypatch.setattr(supervision, "values_of_moments", values)
  with pytest.raises(CheckError) as error:
    check.check_dataset(files / "dataset")
  said = re.match(
    r"user '(c\d+)', snapshot (\S+) \(.*\), task next, all values of the next moment: \S+ holds (.*), "
    r"the raw files give (.*)\. Do not",
    str(error.value),
  )
  assert said is not None, error.value
  user, time, held, given = said.groups()
  lines = random_lines(17)
  begin = datetime.datetime.fromisoformat(time)
  baskets = [x for x in lines if x.client == user and x.at >= begin and len(moment_of(lines, x)) >= 2 and x.article]
  first = min(x.at for x in baskets)
  wanted = tuple(sorted({str(x.article) for x in baskets if x.at == first}))
  assert _parsed(given) == wanted != _parsed(held)


def test_the_good_dataset_passes(files: pathlib.Path) -> None:
  compared = check.check_dataset(files / "dataset")
  assert set(compared) == set(_tasks(files)) and all(n.labels > 5 for n in compared.values())
