"""Embeddings with views hold z and the aggregates of the same user and time, and every verb reads or refuses them."""

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import supermoe_jax as sm
from supermoe_jax import cli, config
from supermoe_jax.batch import ValueCounts
from supermoe_jax.data.append import append
from supermoe_jax.data.dataset import snapshot_batches
from supermoe_jax.embeddings import embed, embedding_files, part_files, views
from supermoe_jax.embeddings.views import Views
from supermoe_jax.errors import ConfigError, DataError
from supermoe_jax.training.run import Run
from tests.fixtures import embedding_folder
from tests.fixtures.messages import messages

DAYS = ["2024-03-01", "2024-05-20"]

# The log has 4 counted pages in five windows.
OTHERS, COUNTS = 28, 4
ANSWERS = [*(f"pages {i}" for i in range(1, 6)), "paid", "quiet"]
BEFORE = 16 + len(ANSWERS)  # z and the answers
WIDTH = BEFORE + OTHERS + COUNTS
VIEWS = f"state 16, answers {len(ANSWERS)}, aggregates {OTHERS}, counts {COUNTS}"


def is_other(name: str) -> bool:
  """Whether an aggregate counts no single page."""
  return not name.startswith("page ")


def is_whole_count(name: str) -> bool:
  return name.startswith("page ") and name.endswith(" all")


@pytest.fixture(scope="module")
def written(run: Run, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  out = tmp_path_factory.mktemp("views") / "all"
  embed.embed(run, DAYS, out, views=True, rows_per_part=32)
  return out


@pytest.fixture(scope="module")
def plain(run: Run, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  out = tmp_path_factory.mktemp("plain") / "all"
  embed.embed(run, DAYS, out, rows_per_part=32)
  return out


def vectors(path: pathlib.Path) -> np.ndarray:
  return embedding_files.embedding_vectors(embedding_files.read_embeddings(path))


def by_hand(run: Run, path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """z and answers `[n, D + K]`, and standardised aggregates `[n, A]`, of a directory's rows, each asked about alone."""
  table = embedding_files.read_embeddings(path, ["user_id", "as_of"])
  rows = {}
  for batch in snapshot_batches.query_batches(run.dataset, run.cfg, times=[config.parse_time(d, "") for d in DAYS]):
    z = np.asarray(run.encode(batch.features, answers=True))
    for i, question in enumerate(batch.questions):
      block = run.dataset.histories(np.array([question.user]))
      time, n_events = np.array([question.time]), np.array([question.n_events])
      found = run.dataset.aggregates(block, np.array([0]), time, n_events)[0]
      rows[int(question.user_id), question.time] = z[i], found
  keys = zip(table["user_id"].to_pylist(), table["as_of"].cast(pa.int64()).to_pylist(), strict=True)
  z, aggregates = zip(*(rows[key] for key in keys))
  assert len(rows) == len(table)
  return np.stack(z), np.stack(aggregates)


def test_the_views_are_the_unit_z_and_the_clipped_aggregates_of_the_same_user_and_time(
  written: pathlib.Path, run: Run
) -> None:
  z, aggregates = by_hand(run, written)
  names, found = run.dataset.aggregator.names, vectors(written)
  others, counts = ([i for i, name in enumerate(names) if chosen(name)] for chosen in (is_other, is_whole_count))
  assert len(others) == OTHERS > 10 and len(counts) == COUNTS and found.shape == (len(z), WIDTH)
  z, answers = z[:, :16], z[:, 16:]
  np.testing.assert_allclose(found[:, :16], z / np.linalg.norm(z, axis=1, keepdims=True), atol=1e-5)
  np.testing.assert_allclose(found[:, 16:BEFORE], answers / np.sqrt(len(ANSWERS)), atol=1e-5)
  assert len(np.unique(answers, axis=0)) > len(answers) / 2
  for first, places in ((BEFORE, others), (BEFORE + OTHERS, counts)):
    wanted = np.clip(aggregates[:, places], -10, 10) / np.sqrt(len(places))
    np.testing.assert_allclose(found[:, first : first + len(places)], wanted, atol=1e-6)
  assert len(np.unique(aggregates, axis=0)) > len(aggregates) / 2  # an exchange of rows would be seen
  assert 0.3 < np.linalg.norm(found[:, 16:], axis=1).mean() < 3


def test_the_manifest_lists_the_views(written: pathlib.Path, plain: pathlib.Path, run: Run) -> None:
  manifest, before = (embedding_files.read_embedding_manifest(path) for path in (written, plain))
  names = run.dataset.aggregator.names
  others, counts = [n for n in names if is_other(n)], [n for n in names if is_whole_count(n)]
  assert manifest["width"] == WIDTH
  assert manifest["views"] == [
    {"name": "state", "start": 0, "width": 16, "columns": None},
    {"name": "answers", "start": 16, "width": len(ANSWERS), "columns": ANSWERS},
    {"name": "aggregates", "start": BEFORE, "width": OTHERS, "columns": others},
    {"name": "counts", "start": BEFORE + OTHERS, "width": COUNTS, "columns": counts},
  ]
  assert set(manifest) - set(before) == {"views"} and before["width"] == 16
  same = set(before) - {"width", "seconds"}
  assert {key: manifest[key] for key in same} == {key: before[key] for key in same}


def test_without_the_flag_vectors_are_z_and_other_columns_are_the_same(
  written: pathlib.Path, plain: pathlib.Path, run: Run
) -> None:
  np.testing.assert_allclose(vectors(plain), by_hand(run, plain)[0][:, :16], atol=1e-5)
  one, other = embedding_files.read_embeddings(written), embedding_files.read_embeddings(plain)
  assert one.drop_columns(["embedding"]).equals(other.drop_columns(["embedding"]))
  assert one.schema.field("embedding").type.list_size == WIDTH
  assert other.schema.field("embedding").type.list_size == 16


def test_each_view_holds_its_columns_divided_by_the_root_of_its_own_width() -> None:
  """Of counts only the last window is kept."""
  names = ["events visits all", "page a 30d", "page a all", "factor page 1", "factor page 2", "recency"]
  layout = Views(2, ["churn"], names, [ValueCounts(1, 2, 1)], slice(3, 5))
  assert [(v["name"], v["start"], v["width"], v["columns"]) for v in layout.about()] == [
    ("state", 0, 2, None),
    ("answers", 2, 1, ["churn"]),
    ("aggregates", 3, 2, [names[0], names[5]]),
    ("counts", 5, 1, [names[2]]),
    ("factors", 6, 2, [names[3], names[4]]),
  ]
  z = np.array([[3.0, 4.0, -1.5], [0.0, 0.0, 99.0]], np.float32)
  aggregates = np.array([[1, 2, 3, 4, 5, 6], [-1e6, 1e6, 11, 10, -10, 0]], np.float32)
  found = layout(z, aggregates)
  assert layout.width == 8 and found.dtype == np.float32
  half = np.sqrt(2)
  expected = [
    [0.6, 0.8, -1.5, 1 / half, 6 / half, 3, 4 / half, 5 / half],
    [0, 0, 10, -10 / half, 0, 10, 10 / half, -10 / half],
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert [v["name"] for v in Views(2, (), names).about()] == ["state", "aggregates"]


def test_half_the_bits_hold_the_views_too(written: pathlib.Path, run: Run, tmp_path: pathlib.Path) -> None:
  embed.embed(run, DAYS, tmp_path / "half", views=True, dtype="float16")
  kind = embedding_files.read_embeddings(tmp_path / "half").schema.field("embedding").type
  assert kind == pa.list_(pa.float16(), WIDTH)
  np.testing.assert_allclose(vectors(tmp_path / "half"), vectors(written), atol=2e-3)


def test_what_is_cut_off_goes_on_with_the_same_bytes_and_never_with_other_views(
  written: pathlib.Path, run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  write = part_files.write_part

  def full(folder: pathlib.Path, number: int, *tables: pa.Table) -> None:
    if number == 1:
      raise OSError("No space left on device")
    write(folder, number, *tables)

  def cut_off(out: pathlib.Path) -> None:
    with monkeypatch.context() as patched, pytest.raises(DataError, match="finished parts are kept"):
      patched.setattr(part_files, "write_part", full)
      embed.embed(run, DAYS, out, views=True, rows_per_part=32)

  cut_off(tmp_path / "out")
  manifest = embed.embed(run, DAYS, tmp_path / "out", views=True, rows_per_part=32)
  assert manifest["users"]["done_before"] == 16
  for file in written.glob("*.parquet"):
    assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
  cut_off(tmp_path / "other")
  manifest = embed.embed(run, DAYS, tmp_path / "other", rows_per_part=32)
  assert manifest["users"]["done_before"] == 0 and manifest["width"] == 16


def test_a_refresh_equals_embedding_all_and_refuses_other_views(run: Run, tmp_path: pathlib.Path) -> None:
  raw = config.to_dict(run.cfg)
  raw["data"]["path"] = str(tmp_path / "dataset")
  shutil.copytree(run.dataset.path, tmp_path / "dataset")
  shutil.copytree(run.workdir, tmp_path / "run")
  config.save(config.resolve(raw), tmp_path / "run" / "config.json")
  later = ["2024-08-01"]
  for name, flag in {"earlier": True, "plain": False}.items():
    embed.embed(Run(tmp_path / "run"), later, tmp_path / name, views=flag)
  new = {"user": [5, 11, 5], "time": np.array(["2024-06-25", "2024-06-26", "2024-06-27"], "datetime64[us]")}
  columns = {"page": ["page1"] * 3, "device": ["web"] * 3, "seconds": [2.0] * 3}
  pq.write_table(pa.table(new | columns), tmp_path / "new.parquet")
  append.append(tmp_path / "dataset", {"visits": [str(tmp_path / "new.parquet")]})
  grown = Run(tmp_path / "run")
  manifest = embed.embed(grown, later, tmp_path / "refreshed", views=True, since=tmp_path / "earlier")
  assert manifest["users"]["computed"] == 2 and manifest["users"]["kept"] == 38
  embed.embed(grown, later, tmp_path / "whole", views=True)
  refreshed, whole, earlier = (vectors(tmp_path / name) for name in ("refreshed", "whole", "earlier"))
  np.testing.assert_allclose(refreshed, whole, atol=1e-5)
  assert (np.abs(refreshed - earlier)[:, BEFORE:].max(axis=1) > 1e-3).sum() == 2
  text = VIEWS
  with pytest.raises(ConfigError, match=f"its views are none, and those of this command {text}; .* or leave out"):
    embed.embed(grown, later, tmp_path / "mixed", views=True, since=tmp_path / "plain")
  with pytest.raises(ConfigError, match=f"its views are {text}, and those of this command none"):
    embed.embed(grown, later, tmp_path / "mixed", since=tmp_path / "earlier")
  assert not list(tmp_path.glob("mixed*"))


def test_a_dataset_without_aggregates_gives_state_and_answers_and_says_so(
  run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(run.dataset, "aggregator", None)
  with messages() as said:
    layout = views.views_of(run)
  assert [v["name"] for v in layout.about()] == ["state", "answers"] and layout.width == BEFORE
  assert len(said) == 1 and "has no aggregates (config.data.aggregates)" in said[0]
  z = np.ones((3, BEFORE), np.float32)
  np.testing.assert_allclose(layout(z, np.zeros((3, 0), np.float32))[:, :16], z[:, :16] / 4)


def test_neighbours_audiences_and_the_report_take_vectors_with_views(
  written: pathlib.Path, run: Run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  near = sm.neighbors(written, k=2, as_of=DAYS[1])
  x = vectors(written)[
    embedding_files.read_embeddings(written)["as_of"].cast(pa.int64()).to_numpy() == config.parse_time(DAYS[1], "")
  ]
  unit = x / np.linalg.norm(x, axis=1, keepdims=True)
  cosine = unit @ unit.T - 2 * np.eye(len(x))
  np.testing.assert_allclose(near["score"].to_numpy()[::2], cosine.max(axis=1), atol=1e-5)
  (tmp_path / "seeds.txt").write_text("\n".join(map(str, range(12))))
  options = ["--embeddings", written, "--as-of", DAYS[1], "--seeds", tmp_path / "seeds.txt", "--size", 5]
  assert cli.main(["audience", *map(str, options), "--out", str(tmp_path / "audience.parquet")]) == 0
  assert len(pq.read_table(tmp_path / "audience.parquet")) == 5
  workdir = tmp_path / "run"
  shutil.copytree(run.workdir, workdir)
  shutil.copytree(written, workdir / "embeddings")
  assert cli.main(["report", "--workdir", str(workdir)]) == 0, capsys.readouterr().err
  assert "supermoe embed" not in (workdir / "report.html").read_text()  # nothing is left to be made


def test_align_refuses_to_mix_views(written: pathlib.Path, plain: pathlib.Path, tmp_path: pathlib.Path) -> None:
  from supermoe_jax.embeddings import align

  for new, old in ((written, plain), (plain, written)):
    with pytest.raises(ConfigError, match=r"all has views \(state 16, .* written without --views"):
      align.align_embeddings(new, old, tmp_path / "out", max_drift=2)
  assert not list(tmp_path.iterdir())


@pytest.fixture
def labels(tmp_path: pathlib.Path) -> pathlib.Path:
  table = {"user_id": np.arange(40), "odd": np.arange(40) % 2}
  pq.write_table(pa.table(table), tmp_path / "labels.parquet")
  return tmp_path / "labels.parquet"


def probe(written: pathlib.Path, labels: pathlib.Path, *more: Any) -> dict[str, Any]:
  out = labels.with_name("figures.json")
  options = ["--embeddings", written, "--labels", labels, "--as-of", DAYS[1], "--models", "logistic", "--repeats", "1"]
  code = cli.main(["probe", *map(str, (*options, "--out", out, *more))])
  return json.loads(out.read_text()) if code == 0 else {}


def test_probe_picks_views(written: pathlib.Path, plain: pathlib.Path, labels: pathlib.Path) -> None:
  """The aggregates' view, standardised by the probe, scores as the aggregates do; the whole has both."""
  other = ["--other", f"whole={written}", "--beside", "aggregates"]
  found = probe(written, labels, "--views", "aggregates", *other)
  about = found["features"]
  assert (about["embeddings"]["width"], about["embeddings"]["views"]) == (OTHERS, ["aggregates"])
  assert (about["whole"]["width"], about["whole"]["views"]) == (WIDTH, ["state", "answers", "aggregates", "counts"])
  assert about["aggregates"]["width"] == OTHERS + 5 * COUNTS  # of every window
  state = probe(written, labels, "--views", "state", "--other", f"plain={plain}")["features"]
  assert state["embeddings"]["width"] == state["plain"]["width"] == 16 and "views" not in state["plain"]


def test_picked_views_are_the_columns_that_the_manifest_names(tmp_path: pathlib.Path) -> None:
  from supermoe_jax.probing import vectors as probed

  x = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)
  path = embedding_folder.write(tmp_path / "written", x)
  manifest = json.loads((path / "manifest.json").read_text())
  (path / "manifest.json").write_text(
    json.dumps(manifest | {"views": Views(3, (), ["b", "factor a 1", "recency"], factors=slice(1, 2)).about()})
  )
  order = [0, 1, 2, 5]
  np.testing.assert_array_equal(probed.read_vectors("x", path, views=["factors", "state"]).x, x[:, order])
  np.testing.assert_array_equal(probed.read_vectors("x", path, views=["aggregates"]).x, x[:, 3:5])
  np.testing.assert_array_equal(probed.read_vectors("x", path).x, x)


def test_views_that_are_not_there_are_an_error_that_names_those_that_are(
  written: pathlib.Path, plain: pathlib.Path, labels: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  assert not probe(written, labels, "--views", "factors")
  assert "has no view 'factors'; name some of state, answers, aggregates, counts." in capsys.readouterr().err
  assert not probe(plain, labels, "--views", "state")
  assert "has no views; leave it out, or embed with --views" in capsys.readouterr().err
  assert not probe(labels, labels, "--views", "state")
  assert "was not written by 'supermoe embed --views'" in capsys.readouterr().err


def test_the_command_and_the_api_write_the_same(
  written: pathlib.Path, workdir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  arguments = ["--workdir", str(workdir), "--as-of", *DAYS, "--out", str(tmp_path / "command"), "--views"]
  assert cli.main(["embed", *arguments]) == 0
  assert f"of width {WIDTH}" in (said := capsys.readouterr().out) and f"views: {VIEWS}" in said
  embeddings = sm.Run(workdir).embed(DAYS, tmp_path / "api", views=True)
  np.testing.assert_allclose(embeddings.vectors(), vectors(written), atol=1e-5)
  np.testing.assert_array_equal(vectors(tmp_path / "command"), embeddings.vectors())
  assert embeddings.manifest["views"] == embedding_files.read_embedding_manifest(written)["views"]
  labels = pa.table({"user_id": list(range(40)), "odd": [u % 2 for u in range(40)]})
  report = sm.probe(embeddings, labels, as_of=DAYS[1], models=["logistic"], beside=[], views=["state"])
  assert report.result["features"]["embeddings"]["width"] == 16
