"""Small event files in every format, and the configs that read them."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding.histories import UserHistory
from supermoe_jax.data.preparation import fitting, prepare
from supermoe_jax.data.preparation.event_log import EventLog
from tests.fixtures import small_log
from tests.fixtures.dataset_copies import copied
from tests.fixtures.event_rows import histories
from tests.fixtures.every_kind_log import raw_config, write_files
from tests.fixtures.shared import made_once
from tests.fixtures.small_log import write_log


@pytest.fixture(params=["events.parquet", "events.csv", "events.jsonl", "events.inter"])
def name(request: pytest.FixtureRequest) -> str:
  """The name of a file in each format."""
  return request.param


@pytest.fixture
def write(tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
  """Writes columns (name → values, None is absent) to a file in the format of its ending."""

  def run(name: str, columns: Mapping[str, Sequence[Any]] | pa.Table) -> pathlib.Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".parquet", ".pq"):
      pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(dict(columns)), path)
      return path
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="") as out:
      out.write(_text(name.removesuffix(".gz").rpartition(".")[2], list(columns), rows))
    return path

  return run


def _text(kind: str, names: list[str], rows: list[list[Any]]) -> str:
  if kind in ("jsonl", "ndjson", "json"):
    records = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    return "[" + ",\n".join(records) + "]" if kind == "json" else "".join(r + "\n" for r in records)
  rows = [["" if v is None else v for v in row] for row in rows]
  if kind in ("inter", "user", "item"):
    return "".join("\t".join(map(str, row)) + "\n" for row in [[f"{n}:token" for n in names], *rows])
  lines: list[str] = []
  csv.writer(_Lines(lines), delimiter="\t" if kind == "tsv" else ",", lineterminator="\n").writerows([names, *rows])
  return "".join(lines)


class _Lines:
  """What `csv.writer` writes to."""

  def __init__(self, lines: list[str]):
    self.write = lines.append


@pytest.fixture
def make_data() -> Callable[..., config.Data]:
  """Makes a data config of the source `log` with the vocabulary field `item`; keywords replace its keys."""

  def run(*files: pathlib.Path | str, source: Mapping[str, Any] | None = None, **changes: Any) -> config.Data:
    log = {"files": [str(f) for f in files], "user": "user", "time": "time", **(source or {})}
    split = {"train_end": "2021-01-01", "validation": ["2021-01-01"], "test": ["2021-02-01"]}
    raw = {"path": "unused", "sources": {"log": log}, "fields": {"item": {}}, "split": split, **changes}
    single = {n: f for n, f in raw["fields"].items() if not f.get("many")} or raw["fields"]
    field = next(n for n, f in single.items() if f.get("kind", "vocabulary") == "vocabulary")
    return config.resolve({"data": raw, "tasks": {"next": {"kind": "next_event", "field": field}}}).data

  return run


@pytest.fixture
def open_log(tmp_path: pathlib.Path) -> Callable[[config.Data], EventLog]:
  """Opens an event log with scratch space of its own."""
  number = itertools.count()

  def run(data: config.Data) -> EventLog:
    scratch = tmp_path / f"scratch-{next(number)}"
    scratch.mkdir()
    return EventLog(data, scratch)

  return run


@pytest.fixture
def read(
  open_log: Callable[[config.Data], EventLog],
) -> Callable[[config.Data], tuple[list[UserHistory], dict[str, Any]]]:
  """Reads a config's events: the histories, encoded by encoders fitted on them, and the counts."""

  def run(data: config.Data) -> tuple[list[UserHistory], dict[str, Any]]:
    with open_log(data) as log:
      return histories(log, fitting.fit_encoders(log, data)), log.counts

  return run


# ---------------------------------------------------------------------------------------- a dataset of every kind


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Files with a label of every kind, and their dataset in `dataset`; do not change them."""

  def make(folder: pathlib.Path) -> None:
    write_files(folder)
    prepare.prepare(config.resolve(raw_config(folder)))

  return made_once(tmp_path_factory, "every_kind", make)


@pytest.fixture(scope="session")
def rich(folder: pathlib.Path) -> config.Config:
  return config.resolve(raw_config(folder))


@pytest.fixture(scope="session")
def data(rich: config.Config) -> Dataset:
  return Dataset(rich.data.path)


@pytest.fixture(scope="session")
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


# ------------------------------------------------------------------------------------------------ a dataset to change


def _complete(folder: pathlib.Path) -> config.Config:
  """A config of the small log that is complete for longer than it goes."""
  raw = small_log.raw_config(folder)
  raw["data"]["split"]["log_end"] = "2024-09-01"
  return config.resolve(raw)


@pytest.fixture(scope="session")
def few_users(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The small log's files of twelve users, and their dataset; do not change them."""

  def make(folder: pathlib.Path) -> None:
    write_log(folder, users=12)
    prepare.prepare(_complete(folder))

  return made_once(tmp_path_factory, "few_users", make)


@pytest.fixture
def appendable(few_users: pathlib.Path, tmp_path: pathlib.Path) -> config.Config:
  """The config of a small dataset that is prepared, for the test alone."""
  copied(few_users, tmp_path)
  return _complete(tmp_path)


@pytest.fixture
def unprepared(few_users: pathlib.Path, tmp_path: pathlib.Path) -> config.Config:
  """The same config, where only the files are there."""
  for file in few_users.glob("*.parquet"):
    shutil.copy2(file, tmp_path)
  return _complete(tmp_path)
