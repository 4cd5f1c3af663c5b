"""What is said of a dataset: every number of the manifest that a user should see, and nothing that is not so."""

from __future__ import annotations

from typing import Any

from supermoe_jax.data.preparation import summary


def reading(**changes: Any) -> dict[str, Any]:
  sources = {
    "visits": {"rows_read": 30_000, "rows_kept": 30_000, "dropped": {}, "files": {"v.csv": 30_000}, "empty_files": []},
    "buys": {"rows_read": 4567, "rows_kept": 4567, "dropped": {}, "files": {"b.csv": 4567}, "empty_files": []},
  }
  for name in sources:
    sources[name] |= changes.pop(name, {})
  whole = {"rows_read": 34_567, "duplicate_rows": 0, "user_rows_dropped": 0, "nulls": {"price": 0}, "dropped": {}}
  return {"tie_rate": 0.125, **whole, "sources": sources, **changes}


def manifest(**changes: Any) -> dict[str, Any]:
  split = {"mode": "temporal", "min_events": 1, "validation": ["2024-03-01"], "test": ["2024-04-01"]}
  data = {"path": "runs/x", "split": split, "fields": {"tags": {"many": 2}, "price": {"sources": ["buys"]}}}
  following = {"kind": "next_event", "field": "page"}
  tasks = {
    "quiet": {"kind": "future_event"},
    "next": following,
    "old": following,
    "one": {**following, "ties": "order"},
  }
  tasks["next"] = {**following, "ties": "auto"}  # "old" is of a version that knew no other than the order of the files
  return {
    "users": 1200,
    "events": 34_567,
    "log": {"first": "2024-01-01T00:00:00", "last": "2024-05-29T21:42:19"},
    "lengths": {"p50": 24.0, "p100": 380.0},
    "reading": reading(),
    "snapshots": {"train": 2030, "validation": 31, "test": 32},
    "snapshots_with_too_few_events": 0,
    "repeated_snapshots": 0,
    "users_without_training_events": 0,
    "users_without_snapshot": 0,
    "labels": {
      "quiet": {"train": {"known": 1730, "positive": 28}, "test": {"known": 30, "positive": 9}},
      "next": {"train": {"known": 1, "unseen_value": 1}},
      "age": {"train": {"known": 77, "mean": 0.5, "std": 1.25}, "test": {"known": 0, "mean": 0.0, "std": 0.0}},
      "tier": {"train": {"known": 21, "classes": dict(zip("abcdef", range(6, 0, -1)))}},
    },
    "user_table": {
      "user_labels": {
        "tier": {"labelled": 21, "unseen_class": 3, "without_value": 0},
        "age": {"labelled": 77, "unseen_class": 0, "dropped": 4, "without_value": 19},
      },
      "labelled_users": 98,
      "labelled_users_without_events": 0,
    },
    "fields": {
      "page": {"oov_training": 0.0, "oov_after": 0.0123},
      "bucket": {"oov_training": 0.0, "oov_after": 0.0, "colliding": 0.25, "values": 1600},
      "tags": {"oov_training": 0.25, "oov_after": None, "values_cut": 17},
    },
    "tally": {"lengths": {"24": 1100, "380": 100}},
    "warnings": ["task quiet has no label in validation"],
    "seconds": 7.4,
    "config": {"data": data, "tasks": tasks, "model": {"max_events": 380}},
    **changes,
  }


def test_the_summary_says_what_the_manifest_counts() -> None:
  assert summary.dataset_summary(manifest()).splitlines() == [
    "1,200 users, 34,567 events from 2024-01-01T00:00:00 to 2024-05-29T21:42:19 (median 24 a user, at most 380); "
    "12.5% share user and time",
    "snapshots: 2,030 train, 31 validation, 32 test",
    "  quiet: train 1,730 known (28 positive), test 30 known (9 positive)",
    "  next: train 1 known (1 unseen value)",
    "  age: train 77 known (mean 0.5, deviation 1.25, standardised), test 0 known",
    "  tier: train 21 known (6 a, 5 b, 4 c, 3 d, 2 e)",
    "  next: any value of the next moment is right (12.5% of the prepared events share user and time with another)",
    "task tier: 3 of 24 users (12.5%) have a class that no training user has; they have no label",
    "task age: 19 of 100 users (19.0%) of config.data.users have no value, so no label",
    "task age: the values of 4 of 100 users (4.0%) are no numbers; they have no label",
    "field page: 1.23% of the values after the training period were unseen in it",
    "field bucket: 25.00% of the 1,600 hashed values share their code with others",
    "field tags: 25.00% of the values in training are out of vocabulary (size, min_count)",
    "field tags: 17 values of lists longer than 2 were cut off",
    "warning: task quiet has no label in validation",
    "prepared in 7 s: runs/x",
  ]


def test_repeated_snapshots_and_a_split_of_users_are_said() -> None:
  by_user = manifest(repeated_snapshots=5)
  by_user["config"]["data"]["split"]["mode"] = "user"
  lines = summary.dataset_summary(by_user).splitlines()
  assert "5 of 2,098 snapshots (0.2%) lie at the time of another one (events of equal time) and were left out" in lines
  assert "field page: 1.23% of the values of other users were unseen in training" in lines


def test_the_summary_of_an_append_says_what_came() -> None:
  append = {
    "events": 5000,
    "users_with_new_events": 300,
    "new_users": 20,
    "users_with_other_labels": 7,
    "repeats_of_earlier_events": 0,
    "beyond_patterns": {"visits": ["day.parquet"], "buys": []},
    "vocabularies": {"page": {"added": 6, "first": list("abcdef"), "left_out": 2}, "kind": {"added": 0, "left_out": 0}},
  }
  counted = manifest(appends=[{"events": 1}, append], shards={"one": 1200, "two": 1207}, warnings=[])
  assert summary.append_summary(counted).splitlines() == [
    "5,000 events appended: 300 users rewritten, 20 of them new; 893 left unchanged",
    "7 users without new events were rewritten, because more of their labels are known now",
    "config.data.sources.visits.files must also match day.parquet; otherwise train refuses this dataset",
    "field page: 6 new values have a code now ('a', 'b', 'c', 'd', 'e', …); retrain models for them",
    "field page: 2 new values of training stay out of vocabulary",
    "of 2,407 records 1,207 are out of date; preparing again frees their space",
    "1,200 users, 34,567 events up to 2024-05-29T21:42:19; appended in 7 s",
  ]
  repeated = append | {"users_with_other_labels": 0, "repeats_of_earlier_events": 9, "vocabularies": {}}
  kept = summary.append_summary(counted | {"appends": [repeated], "shards": {"one": 2400}}).splitlines()
  assert kept[0].endswith("900 left unchanged") and "out of date" not in "".join(kept)
  assert kept[1] == "9 events repeat earlier ones and were kept (config.data.duplicates)"
  dropped = counted | {"appends": [repeated], "reading": reading(dropped={"duplicate": 9})}
  assert "9 events repeat earlier ones and were left out" in summary.append_summary(dropped)


def test_rows_of_dated_labels_without_a_label_are_said_by_reason() -> None:
  count = {
    "files": {"a.csv": 900, "b.csv": 100},
    "dropped": {"unparsable_time": 2},
    "without_value": 0,
    "of_users_without_events": 900,
    "outside_periods": 3,
    "known_too_late": 4,
    "unseen_class": 0,
    "repeated": 1,
    "contradicting": 0,
    "placed": {"train": 50, "validation": 5, "test": 5},
  }
  known = {"train": {"known": 48, "positive": 8}, "test": {"known": 5, "positive": 1}}
  said = manifest(dated_labels={"risky": count}, labels={"risky": known})
  assert [line for line in summary.dataset_summary(said).splitlines() if "risky" in line][1:] == [
    "  risky: 916 of 1,000 rows give no label: 2 dropped (unparsable time), 900 of users without events, 3 outside "
    "the periods of the split, 4 known only after the period of their time (delay_days), 7 with too few events before "
    "them",
    "  risky: 1 row repeats the user and time of an earlier row and was left out; at 0 of these moments the labels "
    "differ, and the first row's label counts",
  ]
  assert summary.dated_rows_text({**count, **dict.fromkeys(REASONS, 0), "dropped": {}, "repeated": 0}, 60) == []


REASONS = ("without_value", "of_users_without_events", "outside_periods", "known_too_late", "unseen_class")
