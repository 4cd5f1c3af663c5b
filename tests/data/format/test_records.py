"""Records of every kind of task: their counts in the manifest, their errors, and which are kept in memory."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset import snapshot_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding.splits import SPLITS, TEST
from supermoe_jax.data.preparation import prepare, summary
from supermoe_jax.errors import ConfigError, DataError
from tests.fixtures.every_kind_log import raw_config


def test_the_manifest_counts_every_kind(data: Dataset) -> None:
  records = [data[i] for i in range(len(data))]
  for split, index in SPLITS.items():
    here = [r["snapshot_split"] == index for r in records]

    def values(name: str, here: list[np.ndarray] = here) -> np.ndarray:
      return np.concatenate([r[f"label_{name}"][s][r[f"known_{name}"][s] > 0] for r, s in zip(records, here)])

    counts = {n: splits[split] for n, splits in data.manifest["labels"].items()}
    assert set(counts) == set(data.config.labelled_tasks)
    for name in ("click", "good", "quiet", "paid"):
      assert counts[name] == {"known": len(values(name)), "positive": int(values(name).sum())}
    by_class = np.bincount(values("segment"), minlength=3).tolist()
    assert counts["segment"]["classes"] == dict(zip(data.encoders.labels["segment"].values, by_class))
    for name in ("rating", "age", "stars", "shows_soon"):
      assert counts[name]["known"] == len(values(name)) > 0
      moments = (values(name).mean(), values(name).std())
      assert (counts[name]["mean"], counts[name]["std"]) == pytest.approx(moments, rel=1e-4, abs=1e-6)
    for name in ("stars", "shows_soon"):
      assert (counts[name]["zero"], counts[name]["negative"]) == (int((values(name) == 0).sum()), 0)
  rates = data.manifest["label_rates"]
  assert set(rates) == set(data.config.labelled_tasks) - {"next_item", "next_liked"}
  assert sum(rates["segment"]) == pytest.approx(1) and len(rates["items"]) == 4
  text = summary.dataset_summary(data.manifest)
  assert "segment: train" in text and "standardised" in text


def test_a_misspelt_positive_value_of_an_event_label_is_named(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  raw = raw_config(folder)
  raw["data"]["path"] = str(tmp_path / "dataset")
  raw["tasks"]["click"]["positive"] = ["yess"]
  message = r"tasks\.click\.positive: 'yess' never occurs .* field 'click'.*did you mean 'yes'\? \(it holds 'no', 'yes'"
  with pytest.raises(DataError, match=message):
    prepare.prepare(config.resolve(raw))


def test_a_sample_space_over_classes_that_are_no_numbers_is_an_error(
  folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  raw = raw_config(folder)
  raw["data"]["path"] = str(tmp_path / "dataset")
  raw["tasks"]["age"]["sample_space"] = "segment == 1"
  with pytest.raises(ConfigError, match="the classes of segment are not all numbers"):
    prepare.prepare(config.resolve(raw))


def test_leave_one_out_knows_user_and_event_labels(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  raw = raw_config(folder)
  raw["data"] |= {"path": str(tmp_path / "dataset"), "split": {"mode": "leave_one_out"}}
  raw["tasks"] = {n: raw["tasks"][n] for n in ("next_item", "click", "paid", "age")}
  cfg = config.resolve(raw)
  manifest = prepare.prepare(cfg)
  assert all(manifest["labels"][n][s]["known"] for n in ("click", "paid", "age") for s in ("train", "test"))
  for batch in snapshot_batches.query_batches(Dataset(cfg.data.path), cfg, split=TEST):
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
  from supermoe_jax.data.dataset import dataset

  size = sum(v.nbytes for v in data[0].values() if isinstance(v, np.ndarray))
  monkeypatch.setattr(dataset, "KEPT_BYTES", size)
  small = Dataset(data.path)
  assert small[0]["time"] is small[0]["time"]
  assert small[1]["time"] is not small[1]["time"]
  np.testing.assert_array_equal(small[1]["time"], data[1]["time"])


@pytest.mark.parametrize("content", [b"\xff\xff\xff", b"", b"\x0a\x00"])
def test_bytes_that_are_no_record_are_an_error(data: Dataset, content: bytes) -> None:
  with pytest.raises(DataError, match=r"a record of .* is damaged"):
    data.decode(content)


def test_a_record_cannot_be_changed(data: Dataset) -> None:
  with pytest.raises(ValueError, match="read-only"):
    data[0]["time"][0] = 0
