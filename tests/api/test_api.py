"""The Python API: from data frames to predictions of how good embeddings are, without a file of one's own."""

import logging
import pathlib
from typing import Any

import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import supermoe_jax as sm
from supermoe_jax import config
from tests.fixtures import small_log


@pytest.fixture
def tables(log_folder: pathlib.Path) -> dict[str, pa.Table]:
  return {name: pq.read_table(log_folder / f"{name}.parquet") for name in ("visits", "buys", "users")}


def in_frames_of(kind: str, table: pa.Table) -> Any:
  if kind == "arrow":
    return table
  return polars.from_arrow(table) if kind == "polars" else table.to_pandas()


@pytest.mark.parametrize("kind", ["arrow", "pandas", "polars"])
def test_data_frames_give_the_dataset_that_their_files_give(
  kind: str, tables: dict[str, pa.Table], dataset: Any, tmp_path: pathlib.Path
) -> None:
  raw = small_log.raw_config(pathlib.Path("nowhere"))
  raw["data"]["path"] = str(tmp_path / "dataset")
  cfg = sm.load_config(raw, tables={name: in_frames_of(kind, table) for name, table in tables.items()})
  mine = sm.prepare(cfg)
  assert "40 users" in repr(mine) and "next_page: 839 labels in train" in repr(mine)
  assert len(mine) == len(dataset) and mine.manifest["labels"] == dataset.manifest["labels"]
  assert all(mine[i].keys() == dataset[i].keys() for i in range(len(mine)))
  for i in range(len(mine)):
    np.testing.assert_array_equal(mine[i]["codes"], dataset[i]["codes"])
  # The same frames again are the same data: the dataset that is there is opened.
  again = sm.load_config(raw, tables={name: in_frames_of(kind, table) for name, table in tables.items()})
  assert sm.prepare(again).manifest == mine.manifest


def test_inspect_proposes_a_config_for_data_frames_that_load_config_takes(
  tables: dict[str, pa.Table], tmp_path: pathlib.Path
) -> None:
  found = sm.inspect({name: tables[name] for name in ("visits", "buys")})
  assert "Proposed config" in repr(found) and "visits" in repr(found)
  overrides = {"data.path": str(tmp_path / "dataset"), "train.steps": 3, "train.warmup_steps": 1}
  cfg = sm.load_config(found, overrides)
  assert cfg.data.path == str(tmp_path / "dataset") and cfg.train.steps == 3


def test_overrides_are_a_mapping_or_arguments(log_folder: pathlib.Path) -> None:
  raw = small_log.raw_config(log_folder)
  for overrides in ({"train.steps": 7}, ["train.steps=7"], ["--config.train.steps=7"]):
    assert sm.load_config(raw, overrides).train.steps == 7
  with pytest.raises(sm.ConfigError, match="has no key 'stepps'; did you mean 'steps'"):
    sm.load_config(raw, {"train.stepps": 7})
  with pytest.raises(sm.ConfigError, match="the config has no source 'visit'; did you mean 'visits'"):
    sm.load_config(raw, tables={"visit": pa.table({"user": [1]})})
  with pytest.raises(sm.DataError, match="table 'visits' is a list; give a pandas, polars or Arrow table"):
    sm.load_config(raw, tables={"visits": [1, 2]})


def test_training_goes_on_and_returns_the_run(cfg: config.Config, workdir: pathlib.Path, run: Any) -> None:
  again = sm.train(cfg, workdir)
  assert again.step == run.step == cfg.train.steps
  assert repr(again).startswith(f"Run({str(workdir)!r}: step 12 of 12, 40 users, width 16, tasks next_page, ")


def test_a_run_is_evaluated_embedded_searched_and_probed(
  workdir: pathlib.Path, tmp_path: pathlib.Path, tables: dict[str, pa.Table], capsys: pytest.CaptureFixture[str]
) -> None:
  run = sm.Run(workdir)
  evaluation = sm.Evaluation(run.evaluate().result)
  table = evaluation.to_table()
  assert set(table["model"].to_pylist()) >= {"supermoe", "most popular", "constant"}
  assert table.filter(table["main"]).num_rows > 0
  assert "next_page" in repr(evaluation) and "supermoe" in repr(evaluation)

  embeddings = run.embed("2024-06-01", tmp_path / "embeddings")
  assert len(embeddings) == 40 and embeddings.vectors().shape == (40, 16)
  assert len(polars.DataFrame(embeddings)) == 40
  assert repr(embeddings).endswith("40 rows of width 16, as of 2024-06-01T00:00:00)")
  assert sm.read_embeddings(tmp_path / "embeddings").equals(embeddings.to_table())

  near = sm.neighbors(embeddings, [3, 5], k=2)
  assert near["rank"].to_pylist() == [1, 2, 1, 2] and near["user_id"].to_pylist() == [3, 3, 5, 5]
  assert sm.neighbors(embeddings, k=2).num_rows == 80

  labels = pa.table({"user_id": list(range(40)), "odd": [u % 2 for u in range(40)]})
  report = sm.probe(embeddings, labels, models=["logistic"], beside=[])
  assert set(report.result["labels"]) == {"odd"} and "odd" in repr(report)
  assert report.to_table().num_rows >= 1
  assert capsys.readouterr() == ("", "")  # nothing is printed unless asked


def test_messages_go_to_the_logger(
  log_folder: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  cfg = sm.load_config(small_log.raw_config(log_folder), {"data.path": str(tmp_path / "dataset")})
  with caplog.at_level(logging.INFO, logger="supermoe_jax"):
    sm.prepare(cfg)
  assert any(record.name.startswith("supermoe_jax.data") for record in caplog.records)


def test_public_names_are_there_and_imported_when_they_are_used() -> None:
  assert set(sm.__all__) <= set(dir(sm))
  for name in sm.__all__:
    assert getattr(sm, name) is not None
  with pytest.raises(AttributeError, match="has no attribute 'trian'"):
    sm.trian  # noqa: B018
