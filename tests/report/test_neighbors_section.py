"""Neighbours of sample users: exact, the same in chunks, and shown with events as the log has them."""

from __future__ import annotations

import datetime
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding.numeric import Numeric, Quantile
from supermoe_jax.embeddings import selection
from supermoe_jax.report import neighbors_section, readable_events, run_files
from tests.fixtures.report_run import write_vectors

TIME = config.parse_time("2024-05-20", "")


def write(folder: pathlib.Path, vectors: np.ndarray, users: list[int], rows: tuple[int, ...] = ()) -> None:
  """Embeddings at `TIME`, and the first of them as an earlier one of the second user, who would be its nearest."""
  write_vectors(folder, vectors, users, TIME, "x", rows)


@pytest.fixture
def vectors() -> np.ndarray:
  return np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)


def test_neighbours_are_those_of_all_cosines(tmp_path, vectors) -> None:
  write(tmp_path / "whole", vectors, [100 + i for i in range(60)])
  write(tmp_path / "parts", vectors, [100 + i for i in range(60)], (7, 30))
  asked = np.array([0, 3, 40])
  unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
  found = neighbors_section.nearest_rows(selection.select_rows(tmp_path / "whole"), asked, 5)
  for i, row in zip(asked, found):
    cosine = unit @ unit[i]
    order = [j for j in np.argsort(-cosine) if j != i][:5]
    assert [n.row for n in row] == order
    assert [n.cosine for n in row] == pytest.approx(cosine[order], abs=1e-6)
  again = neighbors_section.nearest_rows(selection.select_rows(tmp_path / "parts"), asked, 5)
  assert [[n.row for n in row] for row in again] == [[n.row for n in row] for row in found]


def test_a_vector_of_zeros_is_near_to_nobody(tmp_path, vectors) -> None:
  vectors[5] = 0
  write(tmp_path / "some", vectors, list(range(60)))
  (row,) = neighbors_section.nearest_rows(selection.select_rows(tmp_path / "some"), np.array([3]), 59)
  assert next(n for n in row if n.row == 5).cosine == 0


def test_users_of_a_run_are_shown_with_their_last_events(tmp_path, cfg, dataset, vectors) -> None:
  run = tmp_path / "run"
  users = [int(dataset[i]["user"]) for i in range(len(dataset))] + [12345]
  write(run / "embeddings", vectors[: len(users)], users)
  config.save(cfg, run / "config.json")
  found = neighbors_section.neighbors_section(run_files.read_run(run))
  assert found is not None and found["reason"] == ""
  assert len(found["people"]) == len(neighbors_section.QUANTILES) and found["rows"] == len(users)
  assert found["unnamed"] == ["device"]
  everyone = [*found["people"], *(n for p in found["people"] for n in p["near"])]
  assert all(len(p["near"]) == neighbors_section.NEIGHBOURS for p in found["people"])
  log = pq.read_table(cfg.data.sources["visits"].files[0]).to_pylist()
  looked = 0
  for person in everyone:
    if person["user"] == "12345":
      assert person["last"] is None  # embedded once, and not in the dataset
      continue
    own = [r for r in log if str(r["user"]) == person["user"] and r["time"] < datetime.datetime(2024, 5, 20)]
    newest = max(own, key=lambda r: r["time"])
    shown = next(e for e in person["last"] if e.source == "visits")
    assert shown.time == newest["time"].strftime("%Y-%m-%d %H:%M")
    values = dict(shown.values)
    assert values["page"] == newest["page"] and "device" not in values
    assert float(values["seconds"].replace(",", "")) == pytest.approx(newest["seconds"], rel=0.01)
    looked += 1
  assert looked > 10


def test_embeddings_of_each_users_own_time_show_what_lies_before_it(tmp_path, cfg, dataset, vectors) -> None:
  run = tmp_path / "run"
  write(run / "embeddings", vectors[: len(dataset)], [int(dataset[i]["user"]) for i in range(len(dataset))])
  file = next((run / "embeddings").glob("part-*.parquet"))
  table = pq.read_table(file).slice(0, len(dataset))
  moments = [int(dataset.history(dataset[i]).time[0]) + 1 for i in range(len(dataset))]  # just after the first event
  place = table.column_names.index("as_of")
  pq.write_table(table.set_column(place, "as_of", pa.array(moments, pa.timestamp("us"))), file)
  config.save(cfg, run / "config.json")
  found = neighbors_section.neighbors_section(run_files.read_run(run))
  assert found is not None and found["rows"] == len(dataset) and "each user's latest time" in found["time"]
  first = {dataset[i]["user"]: moments[i] - 1 for i in range(len(dataset))}
  for person in (*found["people"], *(n for p in found["people"] for n in p["near"])):
    assert {e.time for e in person["last"]} == {readable_events.moment_text(first[person["user"]])}


def test_without_the_dataset_there_are_no_events_to_show(tmp_path, cfg, vectors) -> None:
  run = tmp_path / "run"
  write(run / "embeddings", vectors, list(range(60)))
  raw = config.to_dict(cfg)
  raw["data"]["path"] = str(tmp_path / "gone")
  config.save(config.resolve(raw), run / "config.json")
  found = neighbors_section.neighbors_section(run_files.read_run(run))
  assert found is not None and "not at hand" in found["reason"]


@pytest.mark.parametrize("value", [0.0, 0.01, 1.5, 12.0, 1234.0, -3.0])
@pytest.mark.parametrize("encoding", ["standardise", "log1p"])
def test_numbers_read_as_they_were(value: float, encoding: str) -> None:
  encoder = Numeric.of(0.7, 1.9)
  text = readable_events.number_text(encoder, float(encoder.encode(value, encoding)), encoding)
  assert float(text.replace(",", "")) == pytest.approx(value, rel=0.006, abs=1e-9)


def test_a_quantile_reads_as_its_number_and_beyond_its_knots_as_more_or_less() -> None:
  encoder = Quantile((1.0, 2.0, 10.0), (-1.0, 0.0, 1.0))
  said = [readable_events.number_text(encoder, float(encoder.encode(v)), "quantile") for v in (1.5, 6.0, 11.0, 0.5)]
  assert said == ["1.5", "6", "> 10", "< 1"]


def test_values_out_of_vocabulary_and_midnights_are_said_in_words(dataset: Dataset) -> None:
  assert readable_events._value(dataset.encoders.categorical["page"], 1) == "(out of vocabulary)"
  assert readable_events.moment_text(TIME) == "2024-05-20"
  assert readable_events.moment_text(TIME + 61_000_000) == "2024-05-20 00:01"
