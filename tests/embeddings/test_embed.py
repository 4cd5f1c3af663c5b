"""Embeddings are of the past only, one row a user and time, whole or not there."""

import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import config
from supermoe_jax.batch import Features
from supermoe_jax.data.dataset import snapshot_batches
from supermoe_jax.data.encoding.splits import TEST
from supermoe_jax.data.preparation import prepare
from supermoe_jax.embeddings import embed, embedding_files, part_files
from supermoe_jax.errors import ConfigError, DataError, RunError
from supermoe_jax.training.run import Run
from tests.fixtures import two_processes
from tests.fixtures.small_log import raw_config

DAYS = ["2024-03-01", "2024-05-20"]


@pytest.fixture(scope="module")
def written(run: Run, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  out = tmp_path_factory.mktemp("embeddings") / "all"
  embed.embed(run, DAYS, out, rows_per_part=50)
  return out


def test_there_is_one_row_a_user_and_day_with_events_before_it(written: pathlib.Path, run: Run) -> None:
  table = embedding_files.read_embeddings(written)
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
  table = embedding_files.read_embeddings(written)
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
    table = embedding_files.read_embeddings(path)
    keys = zip(table["user_id"].to_pylist(), table["as_of"].to_pylist())
    return dict(zip(keys, table["embedding"].to_pylist()))

  assert by_key(tmp_path / "embeddings") == by_key(written)


def test_one_day_alone_gives_the_same_vectors(written: pathlib.Path, run: Run, tmp_path: pathlib.Path) -> None:
  embed.embed(run, DAYS[1:], tmp_path / "one")
  one, both = (
    embedding_files.read_embeddings(tmp_path / "one").to_pydict(),
    embedding_files.read_embeddings(written).to_pydict(),
  )
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


def test_what_is_cut_off_goes_on_and_ends_as_if_nothing_had_been(
  written: pathlib.Path, run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Killed while encoding, and with a full disk while writing: finished parts stay, and are not made again."""
  out, work = tmp_path / "out", tmp_path / "out.incomplete"
  write, encode, parts = part_files.write_part, run.encode, []

  def full(folder: pathlib.Path, number: int, *tables: pa.Table) -> None:
    if number:
      (folder / "part-00001.parquet.part").write_bytes(b"half")
      raise OSError("No space left on device")
    parts.append(number)
    write(folder, number, *tables)

  def killed(features: object, *, answers: bool) -> None:
    raise KeyboardInterrupt

  for name, fault, error in (("encode", killed, KeyboardInterrupt), ("write_part", full, DataError)) * 2:
    with monkeypatch.context() as patched, pytest.raises(error):
      patched.setattr(run if name == "encode" else part_files, name, fault)
      embed.embed(run, DAYS, out, rows_per_part=50)
    assert not out.exists() and run.encode == encode
  assert parts == [0] and [f.name for f in work.glob("part-*.parquet")] == ["part-00000.parquet"]
  manifest = embed.embed(run, DAYS, out, rows_per_part=50)
  assert manifest["users"] == {"computed": len(run.dataset) - 25, "kept": 0, "done_before": 25}
  assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in written.iterdir())
  for file in written.glob("*.parquet"):
    assert (out / file.name).read_bytes() == file.read_bytes()


def test_another_command_does_not_go_on_with_what_is_left(
  written: pathlib.Path, run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def full(*unused: object) -> None:
    raise OSError("No space left on device")

  with monkeypatch.context() as patched, pytest.raises(DataError, match="finished parts are kept"):
    patched.setattr(part_files, "write_part", full)
    embed.embed(run, DAYS, tmp_path / "out", rows_per_part=50)
  manifest = embed.embed(run, DAYS, tmp_path / "out", rows_per_part=50, dtype="float16")
  assert manifest["users"]["done_before"] == 0
  half, whole = embedding_files.read_embeddings(tmp_path / "out"), embedding_files.read_embeddings(written)
  assert half.schema.field("embedding").type.value_type == pa.float16()
  np.testing.assert_allclose(
    embedding_files.embedding_vectors(half), embedding_files.embedding_vectors(whole), atol=2e-3
  )


def test_users_without_an_event_yet_are_listed(run: Run, tmp_path: pathlib.Path) -> None:
  """Each user stands once for each time, among those who have an embedding or among those who have none."""
  day = config.parse_time("2024-01-03", "")
  embed.embed(run, ["2024-01-03"], tmp_path / "early", rows_per_part=10)
  rows = embedding_files.read_embeddings(tmp_path / "early")
  absent = pa.concat_tables([pq.read_table(f) for f in embedding_files.absent_files(tmp_path / "early")])
  first = {run.dataset[i]["user"]: int(run.dataset[i]["time"][0]) for i in range(len(run.dataset))}
  assert {str(u) for u in rows["user_id"].to_pylist()} == {u for u, t in first.items() if t < day}
  listed = dict(zip(map(str, absent["user_id"].to_pylist()), absent["first_event_time"].cast("int64").to_pylist()))
  assert listed == {u: t for u, t in first.items() if t >= day} and listed
  assert set(absent["as_of"].cast("int64").to_pylist()) == {day}


def test_now_is_the_end_of_the_log_and_last_each_users_own(run: Run, tmp_path: pathlib.Path) -> None:
  embed.embed(run, ["now"], tmp_path / "now")
  embed.embed(run, ["last"], tmp_path / "last")
  now, last = embedding_files.read_embeddings(tmp_path / "now"), embedding_files.read_embeddings(tmp_path / "last")
  assert len(now) == len(last) == len(run.dataset)
  for name in ("user_id", "n_events", "last_event_time"):
    assert now[name].equals(last[name])
  ends = {run.dataset[i]["user"]: int(run.dataset[i]["time"][-1]) for i in range(len(run.dataset))}
  asked = dict(zip(map(str, last["user_id"].to_pylist()), last["as_of"].cast("int64").to_pylist()))
  assert asked == {u: t + 1 for u, t in ends.items()}
  assert set(now["as_of"].cast("int64").to_pylist()) == {max(ends.values()) + 1}


def test_rows_of_any_length_are_those_of_evaluation(
  run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Evaluation lays every history out at the full length, embedding at the shortest that holds it."""
  lengths, encode = set(), run.encode

  def seen(features: Features, *, answers: bool) -> jax.Array:
    lengths.add(features.segment.shape[1])
    return encode(features, answers=answers)

  monkeypatch.setattr(snapshot_batches, "SHORTEST", 12)
  monkeypatch.setattr(snapshot_batches, "PROGRAM_EVENTS", 1)
  monkeypatch.setattr(run, "encode", seen)
  embed.embed(run, DAYS, tmp_path / "out")
  assert lengths == {12, 24} or lengths == {12, 18, 24}
  table = embedding_files.read_embeddings(tmp_path / "out")
  keys = zip(map(str, table["user_id"].to_pylist()), table["as_of"].cast("int64").to_pylist())
  embedded, compared = dict(zip(keys, embedding_files.embedding_vectors(table))), 0
  for batch in snapshot_batches.query_batches(run.dataset, run.cfg, split=TEST):
    z = np.asarray(run.answer(batch.features, batch.given).z)
    for i, question in enumerate(batch.questions):
      np.testing.assert_allclose(embedded[question.user_id, question.time], z[i], atol=1e-5)
      compared += 1
  assert compared == run.dataset.manifest["snapshots"]["test"] > 20


@pytest.mark.nightly
@pytest.mark.slow
def test_two_processes_share_the_parts_and_write_the_same_rows(
  written: pathlib.Path, run: Run, tmp_path: pathlib.Path
) -> None:
  outputs = two_processes.run("embed_of_two_processes", str(run.workdir), str(tmp_path / "out"), *DAYS)
  wrote = [[int(n) for n in re.findall(r"wrote (\d+)", output)] for output in outputs]
  assert wrote == [[0, 2], [1]]
  together, alone = embedding_files.read_embeddings(tmp_path / "out"), embedding_files.read_embeddings(written)
  assert together.drop_columns(["embedding"]).equals(alone.drop_columns(["embedding"]))
  np.testing.assert_allclose(
    embedding_files.embedding_vectors(together), embedding_files.embedding_vectors(alone), atol=1e-5
  )
  manifest = embedding_files.read_embedding_manifest(tmp_path / "out")
  assert manifest["users"]["computed"] == len(run.dataset) and manifest["rows"] == len(alone)
  embed.embed(run, DAYS, tmp_path / "alone-views", views=True)
  together, alone = (embedding_files.read_embeddings(tmp_path / f"{name}-views") for name in ("out", "alone"))
  assert together["user_id"].equals(alone["user_id"])
  np.testing.assert_allclose(
    embedding_files.embedding_vectors(together), embedding_files.embedding_vectors(alone), atol=1e-5
  )


def test_user_columns_come_along(run: Run, log_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  embed.embed(run, DAYS, tmp_path / "out", columns=["plan"], rows_per_part=20)
  table = embedding_files.read_embeddings(tmp_path / "out")
  known = pq.read_table(log_folder / "users.parquet").to_pydict()
  plan = dict(zip(known["user"], known["plan"]))
  assert table.schema.names == [*part_files.COLUMNS, "plan"]
  assert table["plan"].to_pylist() == [plan.get(u) for u in table["user_id"].to_pylist()]
  assert None in table["plan"].to_pylist() and "paid" in table["plan"].to_pylist()
  assert {f.name.split("-")[0] for f in (tmp_path / "out").iterdir()} <= {"part", "absent", "manifest.json"}


@pytest.mark.parametrize(
  ("columns", "error", "message"),
  [
    (["plna"], DataError, r"no column 'plna' \(--columns\); did you mean 'plan'"),
    (["as_of"], ConfigError, "'as_of' is a column of every embedding table"),
    (["plan", "plan"], ConfigError, "'plan' is named twice"),
  ],
)
def test_a_user_column_that_cannot_come_along_is_an_error(
  run: Run, tmp_path: pathlib.Path, columns: list[str], error: type[Exception], message: str
) -> None:
  with pytest.raises(error, match=message):
    embed.embed(run, DAYS, tmp_path / "out", columns=columns)
  assert not list(tmp_path.iterdir())


def test_a_vector_that_is_not_finite_is_an_error_that_names_the_user(
  run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  encode = run.encode
  monkeypatch.setattr(run, "encode", lambda features, **which: encode(features, **which) * np.float32(1e6))
  with pytest.raises(RunError, match=r"of user '\d+' is not finite as float16 .* --dtype float32"):
    embed.embed(run, DAYS, tmp_path / "out", dtype="float16")


@pytest.mark.parametrize(
  ("days", "message"), [(["soon"], "--as-of='soon' is not a time"), (["2024-03-01", "2024-03-01T00:00"], "twice")]
)
def test_a_day_that_cannot_be_used_is_an_error(run: Run, tmp_path: pathlib.Path, days: list[str], message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    embed.embed(run, days, tmp_path / "out")


def test_a_set_of_parts_that_is_not_whole_is_an_error(written: pathlib.Path, tmp_path: pathlib.Path) -> None:
  copy = tmp_path / "copy"
  shutil.copytree(written, copy)
  (copy / "part-00001.parquet").unlink()
  with pytest.raises(DataError, match="holds 1 parts"):
    embedding_files.read_embeddings(copy)
  (copy / "manifest.json").unlink()
  with pytest.raises(DataError, match="no manifest"):
    embedding_files.read_embeddings(copy)


def test_a_time_before_every_event_gives_an_empty_table_of_the_same_columns(
  written: pathlib.Path, run: Run, tmp_path: pathlib.Path
) -> None:
  assert embed.embed(run, ["2001-01-01"], tmp_path / "none")["rows"] == 0
  assert embedding_files.read_embeddings(tmp_path / "none").schema == embedding_files.read_embeddings(written).schema


def test_a_dataset_is_never_taken_for_embeddings(run: Run, tmp_path: pathlib.Path) -> None:
  copy = tmp_path / "dataset"
  shutil.copytree(run.dataset.path, copy)
  with pytest.raises(DataError, match="holds no embeddings and is not overwritten"):
    embed.embed(run, DAYS, copy, overwrite=True)
  assert (copy / "manifest.json").is_file()
