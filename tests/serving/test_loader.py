"""An exported encoder gives the vectors of the run, needs JAX and NumPy alone, and is whole or refused."""

import datetime
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.export
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import cli, config
from supermoe_jax.data.dataset import snapshot_batches
from supermoe_jax.embeddings import embed, embedding_files
from supermoe_jax.errors import ConfigError, DataError
from supermoe_jax.layers import exchange
from supermoe_jax.layers.table import TableRows
from supermoe_jax.serving import export, loader
from supermoe_jax.serving.loader import ExportedEncoder
from supermoe_jax.serving.preprocessing import InputError
from supermoe_jax.training.checkpoints.checkpoint import RestoredModel
from supermoe_jax.training.run import Run
from supermoe_jax.training.step import abstract_model
from tests.fixtures import exported_encoder

DAY = "2024-05-20"

# Nothing else is found: what jax itself needs, this package, and the standard library.
ALLOWED = ("jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy", "supermoe_jax")

BLOCKED = f"""
import json, sys

class Only:
  def __init__(self, finder):
    self.finder = finder

  def find_spec(self, name, path=None, target=None):
    top = name.partition(".")[0]
    if top in {ALLOWED!r} or top in sys.stdlib_module_names or top.startswith("_sysconfigdata"):
      return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Only(finder) for finder in sys.meta_path]
try:
  import flax
except ModuleNotFoundError:
  pass
else:
  raise SystemExit("flax was found")
from supermoe_jax.serving import loader
encoder = loader.load_encoder(sys.argv[1])
users = json.load(open(sys.argv[2]))
found = encoder.embed(users, {DAY!r})
import numpy
numpy.save(sys.argv[3], found.vectors)
print(json.dumps([sorted(set(p.platforms)) for p in encoder.programs.values()]))
"""


def of_the_run(run: Run) -> dict[str, np.ndarray]:
  """Each user's vector as of the day, as evaluation has it."""
  found = {}
  for batch in snapshot_batches.query_batches(run.dataset, run.cfg, times=[config.parse_time(DAY, "")]):
    z = np.asarray(run.answer(batch.features).z)
    found |= {q.user_id: z[i] for i, q in enumerate(batch.questions)}
  return found


def test_the_loader_gives_the_vectors_of_evaluation_and_of_embed(
  run: Run, encoder: ExportedEncoder, raw_users: dict[str, Any], tmp_path: pathlib.Path
) -> None:
  wanted = of_the_run(run)
  embed.embed(run, [DAY], tmp_path / "embeddings")
  table = embedding_files.read_embeddings(tmp_path / "embeddings")
  embedded = dict(zip(map(str, table["user_id"].to_pylist()), embedding_files.embedding_vectors(table)))
  assert set(wanted) == set(embedded) and len(wanted) > 30
  found = encoder.embed(list(raw_users.values()), DAY)
  for user, vector in zip(raw_users, found.vectors):
    assert (user in wanted) == bool(np.isfinite(vector).all())
    if user in wanted:
      np.testing.assert_allclose(vector, wanted[user], atol=1e-5)
      np.testing.assert_allclose(vector, embedded[user], atol=1e-5)
  assert {p.length for p in (encoder.prepare(u, DAY) for u in raw_users.values())} >= {8, 24}


def test_a_vector_does_not_depend_on_who_shares_the_batch(encoder: ExportedEncoder, raw_users: dict[str, Any]) -> None:
  users = list(raw_users.values())
  together = encoder.embed(users, DAY).vectors
  for start in (0, 7):
    for n in (1, 2, 3, 4, 6):
      some = encoder.embed(users[start : start + n], DAY).vectors
      np.testing.assert_allclose(some, together[start : start + n], atol=1e-5)
  backwards = encoder.embed(users[::-1], DAY).vectors[::-1]
  np.testing.assert_allclose(backwards, together, atol=1e-5)


def test_nothing_but_jax_and_numpy_is_imported(
  exported: pathlib.Path, encoder: ExportedEncoder, raw_users: dict[str, Any], tmp_path: pathlib.Path
) -> None:
  users = list(raw_users.values())[:2]
  (tmp_path / "users.json").write_text(json.dumps(users))
  out = subprocess.run(
    [sys.executable, "-c", BLOCKED, str(exported), str(tmp_path / "users.json"), str(tmp_path / "vectors.npy")],
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert out.returncode == 0, out.stderr[-3000:]
  assert json.loads(out.stdout) == [["cpu", "cuda", "tpu"]] * len(encoder.programs)
  np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), encoder.embed(users, DAY).vectors, atol=1e-5)


def test_every_program_is_lowered_for_every_platform(encoder: ExportedEncoder) -> None:
  assert set(encoder.programs) == {(b, n) for b in (1, 4) for n in (8, 24)}
  for exported in encoder.programs.values():
    assert exported.platforms == ("cpu", "cuda", "tpu") == tuple(encoder.manifest["platforms"])
    assert "_platform_index" in exported.mlir_module()  # which one it runs on is an argument


def test_parameters_are_no_constants_of_the_programs(exported: pathlib.Path, encoder: ExportedEncoder) -> None:
  held = sum(of["bytes"] for of in encoder.manifest["parameters"].values())
  for file in exported.glob("program-*.stablehlo"):
    assert file.stat().st_size < 100_000
  assert held == sum(f.stat().st_size for f in (exported / "parameters").iterdir())
  names = list(encoder.manifest["parameters"])
  assert not [n for n in names if n.startswith("heads")] and any("tables" in n for n in names)


def test_the_manifest_says_what_the_encoder_is(encoder: ExportedEncoder, run: Run) -> None:
  manifest = encoder.manifest
  wanted = {
    "kind": "encoder",
    "step": run.step,
    "config_hash": run.cfg.hash(),
    "data_hash": run.cfg.data_hash(),
    "encoding_hash": run.dataset.manifest["encoding_hash"],
    "width": run.cfg.model.d_model,
    "max_events": run.cfg.model.max_events,
    "batch_sizes": [1, 4],
    "lengths": [8, 24],
    "jax_version": jax.__version__,
  }
  assert {k: manifest[k] for k in wanted} == wanted
  low = jax.export.minimum_supported_calling_convention_version
  assert low <= manifest["calling_convention"] <= jax.export.maximum_supported_calling_convention_version


def test_events_from_the_day_on_are_ignored_and_counted(encoder: ExportedEncoder, raw_users: dict[str, Any]) -> None:
  user = next(iter(raw_users.values()))
  before = {k: [e for e in of if e["time"] < DAY] for k, of in user["events"].items()}
  late = [{"time": f"{DAY}T00:00:00", "page": "page1"}, {"time": "2025-01-01", "page": "never seen"}]
  more = {**before, "visits": [*late, *before["visits"]]}
  alone, both = encoder.embed([{"events": before}], DAY), encoder.embed([{"events": more}], DAY)
  np.testing.assert_array_equal(alone.vectors, both.vectors)
  assert (alone.ignored, both.ignored) == (0, 2) and both.used == alone.used and both.unknown == alone.unknown


@pytest.mark.parametrize("amount", [1e25, -1e300])
def test_a_number_far_beyond_training_is_clipped_and_counted(
  encoder: ExportedEncoder, raw_users: dict[str, Any], amount: float
) -> None:
  user = next(user for user in raw_users.values() if len(user["events"]["buys"]) > 1)
  odd = {"visits": user["events"]["visits"], "buys": [{"time": "2024-01-01", "amount": amount}]}
  found = encoder.embed([user, {"events": odd}], DAY)
  assert found.clipped == {"amount": 1} and [c.clipped for c in found.counts] == [{}, {"amount": 1}]
  assert np.isfinite(found.vectors).all() and np.abs(found.vectors).max(axis=1).min() > 0


@pytest.mark.parametrize("day", [datetime.datetime(2024, 5, 1), datetime.date(2024, 5, 1), np.datetime64("2024-05-01")])
def test_a_time_may_be_a_date_or_a_moment(encoder: ExportedEncoder, raw_users: dict[str, Any], day: Any) -> None:
  users = list(raw_users.values())[:2]
  wanted = encoder.embed(users, "2024-05-01").vectors
  np.testing.assert_array_equal(encoder.embed(users, day).vectors, wanted)
  np.testing.assert_array_equal(encoder.embed(users, [day, day]).vectors, wanted)
  with pytest.raises(InputError, match=r"as_of: 7 is not a time"):
    encoder.embed(users, 7)  # type: ignore[arg-type]


def test_each_user_may_have_a_time_of_their_own(encoder: ExportedEncoder, raw_users: dict[str, Any]) -> None:
  user, days = next(iter(raw_users.values())), ["2024-03-01", DAY]
  both = encoder.embed([user, user], days).vectors
  for i, day in enumerate(days):
    np.testing.assert_allclose(both[i], encoder.embed([user], day).vectors[0], atol=1e-5)
  assert np.abs(both[0] - both[1]).max() > 1e-3
  with pytest.raises(InputError, match="2 times for 1 users"):
    encoder.embed([user], days)


def test_a_user_without_events_before_the_day_has_no_vector(encoder: ExportedEncoder) -> None:
  found = encoder.embed([{"events": {}}, {"events": {"visits": [{"time": "2025-01-01"}]}}], DAY)
  assert np.isnan(found.vectors).all() and found.used == 0 and found.ignored == 1


def test_a_message_names_the_user(encoder: ExportedEncoder) -> None:
  with pytest.raises(InputError, match=r"1\.events\.visits\.0\.seconds: 'x' is not a number"):
    encoder.embed([{"events": {}}, {"events": {"visits": [{"time": "2024-01-01", "seconds": "x"}]}}], DAY)
  with pytest.raises(InputError, match="as_of: 'soon' is not a time"):
    encoder.embed([{"events": {}}], "soon")


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
    (lambda p: (p / "manifest.json").write_text("{"), "is damaged"),
    (lambda p: (p / "manifest.json").write_text("{}"), "holds no exported encoder"),
    (lambda p: (p / "preprocessing.json").write_text("{}"), "preprocessing.json is not as it was written"),
    (lambda p: (p / "program-1x8.stablehlo").write_bytes(b"x"), "program-1x8.stablehlo is not as it was written"),
    (lambda p: (p / "parameters" / "0.npy").write_bytes(b"x"), "has 1 bytes"),
    (lambda p: (p / "parameters" / "0.npy").unlink(), "cannot be read"),
  ],
)
def test_what_is_not_whole_is_refused(
  damage: Any, message: str, exported: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  copy = tmp_path / "copy"
  shutil.copytree(exported, copy)
  damage(copy)
  with pytest.raises(DataError, match=message):
    loader.load_encoder(copy)


def test_an_encoder_that_is_there_is_kept_unless_told(exported: pathlib.Path, run: Run, tmp_path: pathlib.Path) -> None:
  with pytest.raises(DataError, match="add --overwrite"):
    export.export_encoder(run, exported)
  (tmp_path / "thesis.txt").write_text("years of work")
  with pytest.raises(DataError, match="holds no encoder and is not overwritten"):
    export.export_encoder(run, tmp_path, overwrite=True)
  with pytest.raises(ConfigError, match=r"lengths at most config\.model\.max_events=24"):
    export.export_encoder(run, tmp_path / "new", events=(48,))


def test_a_write_that_fails_leaves_nothing(run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  def full(*unused: object) -> None:
    raise OSError("No space left on device")

  monkeypatch.setattr(export, "_write_parameters", full)
  with pytest.raises(DataError, match=r"No space left on device; nothing was kept"):
    export.export_encoder(run, tmp_path / "out")
  assert not list(tmp_path.iterdir())


def test_rows_that_share_lines_on_a_tpu_are_exported_as_plain_rows(run: Run) -> None:
  """The run as it is on a TPU, where a line holds several of these narrow rows."""
  graph, abstract = abstract_model(run.cfg, run.dataset.schema, "tpu")
  shapes = {path: v.get_value().shape for path, v in nnx.to_flat_state(abstract)}

  def laid_out(path: tuple, variable: nnx.Variable) -> jax.Array:
    value = variable.get_value()
    return exchange.restriped(value, shapes[path]) if isinstance(variable, TableRows) else value

  flat = [(path, v.replace(laid_out(path, v))) for path, v in nnx.to_flat_state(run.variables)]
  model = RestoredModel(run.step, nnx.from_flat_state(flat), run.statistics)
  on_tpu = Run.of(run.workdir, run.cfg, run.dataset, run.mesh, graph, model)
  tables = {p for p, v in nnx.to_flat_state(run.variables) if isinstance(v, TableRows)}
  assert tables and all(shapes[p] != v.get_value().shape for p, v in nnx.to_flat_state(run.variables) if p in tables)
  plain, again = (nnx.to_flat_state(export.single_device_run(r)[1]) for r in (run, on_tpu))
  for (path, a), (other, b) in zip(plain, again, strict=True):
    assert path == other
    np.testing.assert_array_equal(a.get_value(), b.get_value())


def test_the_verbs_say_what_was_exported_and_what_is_wrong(
  workdir: pathlib.Path,
  exported: pathlib.Path,
  tmp_path_factory: pytest.TempPathFactory,
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  told = exported_encoder.said(tmp_path_factory, workdir)
  assert "width 16, for cpu, cuda, tpu" in told
  assert "4 programs: batches of 1, 4 × 8, 24 events" in told
  arguments = ["export", "--workdir", str(workdir), "--out", str(exported)]
  assert cli.main(arguments) == 1 and "add --overwrite" in capsys.readouterr().err
  assert cli.main([*arguments, "--overwrite", "--lengths", "0"]) == 1
  assert loader.load_encoder(exported).batch_sizes == (1, 4)
  assert cli.main(["serve", "--model", str(tmp_path / "none")]) == 1
  assert "no manifest.json); run 'supermoe export' first" in capsys.readouterr().err


def test_lengths_are_powers_of_two_up_to_the_longest() -> None:
  assert export.program_lengths(256) == [32, 64, 128, 256]
  assert export.program_lengths(100) == [32, 64, 100]
  assert export.program_lengths(24) == [24]
