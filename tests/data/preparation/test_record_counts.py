"""What a manifest counts, of users few enough to count by hand."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY as DAY
from supermoe_jax.data.encoding.histories import UserBlock
from supermoe_jax.data.encoding.splits import TEST, TRAIN, VALIDATION
from supermoe_jax.data.encoding.vocabulary import Classes
from supermoe_jax.data.preparation import record_counts
from supermoe_jax.data.preparation.snapshots import LeftOut
from supermoe_jax.data.preparation.write_shards import _last_use
from supermoe_jax.data.tasks.calendar import Calendar
from supermoe_jax.data.tasks.labels import Labels, Snapshots

TASKS: dict[str, config.LabelledTask] = {
  "bought": config.FutureEvent(source="buys", horizon_days=3.0),
  "spent": config.UserLabel(column="spent", type="regression"),
  "tier": config.UserLabel(column="tier", type="multiclass"),
  "refill": config.TimeToEvent(horizon_days=3.0, edges_days=(1.0, 2.0, 3.0)),
}
SCHEMA: Any = types.SimpleNamespace(outputs={"bought": 1, "spent": 1, "tier": 3, "refill": 3}, aggregates=2)

# Three users: 7 has events on days 1, 1 and 4, x-1 on day 9, 007 on days 1, 8, 8 and 20.
DAYS = [1, 1, 4, 9, 1, 8, 8, 20]
BLOCK = UserBlock(
  ["7", "x-1", "007"],
  np.array([0, 3, 4, 8]),
  np.array(DAYS) * DAY,
  np.zeros(8, np.int32),
  np.zeros((8, 0), np.int32),
  np.zeros((8, 0), np.float32),
  np.array([3, 0, 1]),
)
SNAPSHOTS = Snapshots(
  np.array([0, 0, 2]), np.array([2, 6, 6]) * DAY, np.array([2, 3, 1], np.int32), np.array([TRAIN, VALIDATION, TRAIN])
)


def counted(times: int = 1) -> record_counts.RecordCounts:
  known = np.array([True, True, True])
  labels = {
    "bought": Labels(np.array([1.0, 1.0, 0.0], np.float32), np.array([True, False, True])),
    "spent": Labels(np.array([0.5, -2.0, 1.5], np.float32), known),
    "tier": Labels(np.array([2, 0, 2], np.int32), known),
    "refill": Labels(np.array([[1.5, 1.0], [2.0, 0.0], [1.0, 0.0]], np.float32), known),
  }
  out = record_counts.RecordCounts(SCHEMA, TASKS)
  for _ in range(times):
    out.add(BLOCK, SNAPSHOTS, labels, LeftOut(too_early=4, repeated=1), last_use=9 * DAY)
    out.add_aggregates(np.array([[1.0, 4.0], [3.0, 4.0]], np.float32), np.array([0, 2]))
  return out


def test_users_events_and_snapshots_are_counted() -> None:
  found = counted()
  assert (found.users, found.events) == (3, 8)
  state = found.state
  assert state["lengths"] == {"1": 1, "3": 1, "4": 1}
  # The event of day 9 and that of day 20 lie at or after the last use.
  assert state["periods"] == {"training": 4, "later": 2, "beyond_every_label": 2}
  assert state["tied"] == 4  # two on day 1 of one user, two on day 8 of another; not those of different users
  assert state["text_users"] == 2  # 64 bits do not hold the zeros of 007
  assert (state["without_training"], state["without_snapshot"]) == (1, 1)
  assert (state["too_early"], state["repeated"]) == (4, 1)
  assert state["snapshots"] == {"train": 2, "validation": 1, "test": 0}
  assert found.length_percentiles()["p50"] == 3.0


def test_labels_are_counted_by_split_and_their_rates_are_those_of_training() -> None:
  found = counted()
  classes: Any = types.SimpleNamespace(labels={"tier": Classes(("a", "b", "c"), (1, 1, 1))})
  labels = found.labels(classes)
  assert labels["bought"] == {
    "train": {"known": 2, "positive": 1},
    "validation": {"known": 0, "positive": 0},
    "test": {"known": 0, "positive": 0},
  }
  assert labels["tier"]["train"] == {"known": 2, "classes": {"a": 0, "b": 0, "c": 2}}
  assert labels["tier"]["validation"] == {"known": 1, "classes": {"a": 1, "b": 0, "c": 0}}
  assert labels["spent"]["train"] == {"known": 2, "mean": 1.0, "std": 0.5}
  assert labels["refill"]["train"] == {"known": 2, "events": 1}
  assert labels["refill"]["validation"] == {"known": 1, "events": 0}
  # In training two labels survived the first interval, and one is followed through the second, where its event is.
  rates = {"bought": [0.5], "spent": [1.0], "tier": [0.0, 0.0, 1.0], "refill": [0.0, 1.0, 1.0]}
  assert found.label_rates() == rates
  assert "no label of task refill in validation ends with an event" in found.warnings(classes)
  assert "task bought has no label in validation" in found.warnings(classes)
  assert "task tier has labels of one class only in train" in found.warnings(classes)


def test_aggregates_have_the_mean_and_the_deviation_of_training_snapshots() -> None:
  assert counted().aggregate_statistics() == {"mean": [2.0, 4.0], "scale": [1.0, 1e30]}


def test_a_count_that_hardly_varies_is_divided_by_the_least_scale() -> None:
  out = record_counts.RecordCounts(SCHEMA, TASKS)
  out.add_aggregates(np.array([[0.0, 0.0], [0.1, 9.0]], np.float32), np.array([0, 0]))
  assert out.aggregate_statistics()["scale"] == [record_counts.SMALLEST_SCALE, 4.5]


def test_what_was_added_can_be_taken_away_again() -> None:
  twice = counted().merge(counted().state)
  assert twice.users == 6 and twice.state["periods"]["later"] == 4
  assert counted(2).state == twice.state
  assert twice.merge(counted().state, sign=-1).state == counted().state
  assert twice.merge(counted().state, sign=-1).state == record_counts.RecordCounts(SCHEMA, TASKS).state


@pytest.mark.parametrize(
  ("tasks", "last"),
  [
    (TASKS, 43),  # three days after the last snapshot
    ({"tier": TASKS["tier"]}, 40),
    ({**TASKS, "next": config.NextEvent(field="item")}, None),  # whatever comes next may be asked about
  ],
)
def test_events_after_every_window_are_of_no_use(tasks: dict[str, config.LabelledTask], last: int | None) -> None:
  times = Calendar(np.array([10, 40]) * DAY, np.array([TRAIN, TEST], np.int32), (10 * DAY, 20 * DAY, 50 * DAY))
  assert _last_use(tasks, times) == (None if last is None else last * DAY)
  assert _last_use(tasks, None) is None
