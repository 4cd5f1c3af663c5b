"""Tables of dated labels take the text settings of other tables, and say what they drop."""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import config
from supermoe_jax.data.check import check
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.preparation import prepare, summary
from supermoe_jax.errors import ConfigError, DataError
from tests.fixtures.dated_labels import SPLIT, labels, stamp


def european(folder: pathlib.Path, text: str, **task: Any) -> config.Config:
  """A config whose table of dated labels is this text, besides a log of ten clients with an event each day."""
  noon = datetime.datetime(2024, 1, 1, 12)
  times = [noon + datetime.timedelta(days=d) for d in range(80)]
  log = {"client": [f"c{a}" for a in range(10) for _ in times], "seen": times * 10}
  pq.write_table(pa.table({**log, "good": [f"g{i % 7}" for i in range(800)]}), folder / "log.parquet")
  (folder / "scores.csv").write_text(text)
  own = {
    "kind": "dated_label",
    "files": [str(folder / "scores.csv")],
    "user": "client",
    "time": "at",
    "column": "score",
  }
  source = {"files": [str(folder / "log.parquet")], "user": "client", "time": "seen"}
  data = {"path": str(folder / "dataset"), "sources": {"log": source}, "fields": {"good": {}}, "split": SPLIT}
  return config.resolve({"data": data, "tasks": {"risky": {**own, "files": [str(folder / "scores.csv")], **task}}})


def nanoseconds(day: str) -> int:
  return stamp(day) * 1000


def test_a_table_of_dated_labels_is_read_with_the_text_settings_of_other_tables(tmp_path: pathlib.Path) -> None:
  days = ("2024-01-20", "2024-01-25", "2024-01-28", "2024-03-05")
  scores = ("1.250,5", "-0,5", "NULL", "2,0")
  rows = [f"c{i};{nanoseconds(day)};{score}\n" for i, (day, score) in enumerate(zip(days, scores))]
  settings = {"header": False, "columns": ["client", "at", "score"], "delimiter": ";", "time_unit": "ns"}
  numbers = {"decimal": ",", "thousands": ".", "null_values": ["NULL"], "type": "regression"}
  cfg = european(tmp_path, "".join(rows), **settings, **numbers)
  found, counts = labels(cfg)
  assert counts["without_value"] == 1 and (counts["mean"], counts["std"]) == (625.0, 625.5)
  assert {u: of for u, of in found.items() if of} == {
    "c0": [("train", "2024-01-20T00:00:00", 19, 1.0)],
    "c1": [("train", "2024-01-25T00:00:00", 24, -1.0)],
    "c3": [("test", "2024-03-05T00:00:00", 64, pytest.approx((2 - 625) / 625.5))],
  }
  check.check_dataset(pathlib.Path(cfg.data.path))


def test_a_damaged_line_of_dated_labels_is_named_or_dropped_and_counted(tmp_path: pathlib.Path) -> None:
  good = [f"c{i},2024-01-{10 + i},{i % 2}\n" for i in range(9)] + ["c0,2024-03-05,1\n"]
  text = "client,at,score\n" + "".join(good[:4]) + "c9,2024-01-20\n" + "".join(good[4:])
  cfg = european(tmp_path, text)
  with pytest.raises(
    DataError, match=r"scores\.csv: line 6 holds 2 values, but the file has 3 columns.*on_bad_rows='drop'"
  ):
    prepare.prepare(cfg)
  dropping = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, on_bad_rows="drop"))
  found, counts = labels(dropping)
  assert counts["dropped"] == {"unreadable_line": 1} and sum(map(len, found.values())) == 10
  said = summary.dataset_summary(Dataset(cfg.data.path).manifest)
  assert "1 of 11 rows give no label: 1 dropped (unreadable line)" in said


def test_text_settings_of_dated_labels_that_are_not_set_change_no_hash(tmp_path: pathlib.Path) -> None:
  plain, set_ = (european(tmp_path, "", **more) for more in ({}, {"delimiter": ";"}))
  assert plain.data_hash() != set_.data_hash()
  assert "delimiter" not in config.to_dict(plain, later=False)["tasks"]["risky"]
  with pytest.raises(ConfigError, match=r"config\.tasks\.risky\.header=False needs the names of all columns"):
    european(tmp_path, "", header=False)
