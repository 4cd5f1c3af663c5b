"""Embeddings are of the past only, one row a user and time, whole or not there."""

import json
import pathlib
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_log import raw_config

from supermoe_jax import config
from supermoe_jax.data import prepare
from supermoe_jax.data.events import DataError
from supermoe_jax.serving import embed, embeddings
from supermoe_jax.training.run import Run

DAYS = ["2024-03-01", "2024-05-20"]


@pytest.fixture(scope="module")
def written(run: Run, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  out = tmp_path_factory.mktemp("embeddings") / "all"
  embed.embed(run, DAYS, out, rows_per_part=50)
  return out


def test_there_is_one_row_a_user_and_day_with_events_before_it(written: pathlib.Path, run: Run) -> None:
  table = embeddings.read(written)
  manifest = json.loads((written / "manifest.json").read_text())
  rows = list(zip(table["user_id"].to_pylist(), table["as_of"].to_pylist()))
  assert len(rows) == len(set(rows)) == manifest["rows"]
  assert manifest["parts"] == len(list(written.glob("part-*.parquet"))) == 2
  for day in DAYS:
    time = config.parse_time(day, "")
    known = [i for i in range(len(run.dataset)) if run.dataset[i]["time"][0] < time]
    count = manifest["as_of"][f"{day}T00:00:00"]
    assert count["rows"] == len(known) == sum(str(t.date()) == day for _, t in rows)
    assert count["users_without_events_before"] == len(run.dataset) - len(known)


def test_the_columns_are_those_promised(written: pathlib.Path, run: Run) -> None:
  table = embeddings.read(written)
  assert table.schema.names == ["user_id", "as_of", "embedding", "n_events", "last_event_time"]
  assert table.schema.field("embedding").type == pa.list_(pa.float32(), run.cfg.model.d_model)
  assert table.schema.field("user_id").type == pa.int64()  # as in the event files
  assert all(last < day for last, day in zip(table["last_event_time"].to_pylist(), table["as_of"].to_pylist()))
  assert np.isfinite(np.stack(table["embedding"].to_pylist())).all()


def test_later_events_leave_the_embedding_bitwise_unchanged(
  written: pathlib.Path, run: Run, log_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """The whole way again with every event at or after the first day altered and others added; the model is the same."""
  raw = raw_config(tmp_path)
  for name in ("visits", "buys", "users"):
    shutil.copy(log_folder / f"{name}.parquet", tmp_path)
  file = tmp_path / "visits.parquet"
  before = pq.read_table(file).to_pydict()
  day = np.datetime64(DAYS[1])
  late = np.array(before["time"], "datetime64[us]") >= day
  assert late.any()
  changed = {
    "user": before["user"] + list(range(40)),
    "time": before["time"] + [(day + np.timedelta64(60, "s")).astype("datetime64[us]").item()] * 40,
    "page": ["page0" if x else p for p, x in zip(before["page"], late)] + ["never seen"] * 40,
    "device": before["device"] + ["fridge"] * 40,
    "seconds": [1e6 if x else s for s, x in zip(before["seconds"], late)] + [3.0] * 40,
  }
  pq.write_table(pa.table(changed), file)
  prepare.prepare(config.resolve(raw))

  workdir = tmp_path / "run"
  shutil.copytree(run.workdir, workdir)
  config.save(config.resolve(raw), workdir / "config.json")
  embed.embed(Run(workdir), DAYS, tmp_path / "embeddings")

  def by_key(path: pathlib.Path) -> dict:
    table = embeddings.read(path)
    keys = zip(table["user_id"].to_pylist(), table["as_of"].to_pylist())
    return dict(zip(keys, table["embedding"].to_pylist()))

  assert by_key(tmp_path / "embeddings") == by_key(written)


def test_one_day_alone_gives_the_same_vectors(written: pathlib.Path, run: Run, tmp_path: pathlib.Path) -> None:
  embed.embed(run, DAYS[1:], tmp_path / "one")
  one, both = embeddings.read(tmp_path / "one").to_pydict(), embeddings.read(written).to_pydict()
  wanted = {u: e for u, t, e in zip(both["user_id"], both["as_of"], both["embedding"]) if str(t.date()) == DAYS[1]}
  assert dict(zip(one["user_id"], one["embedding"])) == wanted


def test_embeddings_that_are_there_are_kept_unless_told(written: pathlib.Path, run: Run) -> None:
  with pytest.raises(DataError, match="add --overwrite"):
    embed.embed(run, DAYS, written)


def test_a_directory_of_something_else_is_never_overwritten(run: Run, tmp_path: pathlib.Path) -> None:
  (tmp_path / "thesis.txt").write_text("years of work")
  with pytest.raises(DataError, match="holds no embeddings and is not overwritten"):
    embed.embed(run, DAYS, tmp_path, overwrite=True)
  assert (tmp_path / "thesis.txt").exists()


def test_a_write_that_fails_leaves_nothing_that_looks_whole(
  run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def full(*unused: object) -> None:
    raise OSError("No space left on device")

  monkeypatch.setattr(embed, "_write_part", full)
  with pytest.raises(DataError, match=r"No space left on device; nothing was kept"):
    embed.embed(run, DAYS, tmp_path / "out")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("days", "message"), [(["soon"], "--as-of='soon' is not a time"), (["2024-03-01", "2024-03-01T00:00"], "twice")]
)
def test_a_day_that_cannot_be_used_is_an_error(run: Run, tmp_path: pathlib.Path, days: list[str], message: str) -> None:
  with pytest.raises(config.ConfigError, match=message):
    embed.embed(run, days, tmp_path / "out")


def test_a_set_of_parts_that_is_not_whole_is_an_error(written: pathlib.Path, tmp_path: pathlib.Path) -> None:
  copy = tmp_path / "copy"
  shutil.copytree(written, copy)
  (copy / "part-00001.parquet").unlink()
  with pytest.raises(DataError, match="holds 1 parts"):
    embeddings.read(copy)
  (copy / "manifest.json").unlink()
  with pytest.raises(DataError, match="no manifest"):
    embeddings.read(copy)


def test_a_time_before_every_event_gives_an_empty_table_of_the_same_columns(
  written: pathlib.Path, run: Run, tmp_path: pathlib.Path
) -> None:
  assert embed.embed(run, ["2001-01-01"], tmp_path / "none")["rows"] == 0
  assert embeddings.read(tmp_path / "none").schema == embeddings.read(written).schema


def test_a_dataset_is_never_taken_for_embeddings(run: Run, tmp_path: pathlib.Path) -> None:
  copy = tmp_path / "dataset"
  shutil.copytree(run.dataset.path, copy)
  with pytest.raises(DataError, match="holds no embeddings and is not overwritten"):
    embed.embed(run, DAYS, copy, overwrite=True)
  assert (copy / "manifest.json").is_file()
