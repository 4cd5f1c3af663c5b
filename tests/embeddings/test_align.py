"""A turned version comes back onto the old one, drift is measured on others than it was fitted on, and gates."""

import json
import pathlib
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import cli
from supermoe_jax.embeddings import align, embedding_files, incremental, part_files
from supermoe_jax.errors import ConfigError, DataError
from tests.fixtures import embedding_folder
from tests.fixtures.embedding_folder import turned

USERS = 400


def vectors(width: int = 16, seed: int = 0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return rng.normal(size=(USERS, width)) / (1 + np.arange(width)) ** 0.5 + 0.2


@pytest.fixture
def old(tmp_path: pathlib.Path) -> pathlib.Path:
  return embedding_folder.write(tmp_path / "old", vectors(), step=7)


def test_a_turned_copy_comes_back_exactly(old: pathlib.Path, tmp_path: pathlib.Path) -> None:
  order = np.random.default_rng(1).permutation(USERS)
  x = (vectors() @ turned(0, 16))[order]
  new = embedding_folder.write(tmp_path / "new", x, order.tolist(), rows_per_part=70)
  manifest = align.align_embeddings(new, old, tmp_path / "out", max_drift=0.01)
  out = embedding_files.read_embeddings(tmp_path / "out")
  np.testing.assert_allclose(embedding_files.embedding_vectors(out), vectors()[order], atol=1e-5)
  to = manifest["aligned_to"]
  assert to["drift"] < 1e-5 and to["neighbours_kept"] == to["after"]["neighbours_across"] == 1.0
  assert to["before"]["mean_cosine"] < 0.9 and to["before"]["neighbours_across"] < 0.5
  assert (to["step"], to["config_hash"], to["data_hash"], to["run"]) == (7, "c", "d", "runs/some")
  assert to["matched_by"] == "user_id and as_of" and to["fitted_users"] + to["users"] == USERS


def test_all_else_of_the_directory_stays(old: pathlib.Path, tmp_path: pathlib.Path) -> None:
  new = embedding_folder.write(tmp_path / "new", vectors() @ turned(0, 16), rows_per_part=70, half=True)
  align.align_embeddings(new, old, tmp_path / "out", max_drift=0.1)
  assert [f.name for f in embedding_files.part_paths(tmp_path / "out")] == [
    f.name for f in embedding_files.part_paths(new)
  ]
  before, after = embedding_files.read_embeddings(new), embedding_files.read_embeddings(tmp_path / "out")
  assert after.schema == before.schema  # float16 too
  assert after.drop(["embedding"]) == before.drop(["embedding"])
  assert json.loads((tmp_path / "out" / "manifest.json").read_text()) | {"aligned_to": 0} == (
    embedding_files.read_embedding_manifest(new) | {"aligned_to": 0}
  )


def test_noise_on_a_turned_copy_is_the_drift_that_is_measured(old: pathlib.Path, tmp_path: pathlib.Path) -> None:
  noise = np.random.default_rng(3).normal(size=(USERS, 16)) * 0.1
  new = embedding_folder.write(tmp_path / "new", (vectors() + noise) @ turned(0, 16))
  to = align.align_embeddings(new, old, tmp_path / "out", max_drift=0.5)["aligned_to"]
  a, b = vectors() + noise, vectors()
  expected = 1 - align.row_cosines(a - a.mean(axis=0), b - b.mean(axis=0)).mean()
  assert to["drift"] == pytest.approx(expected, rel=0.25) and 0.01 < to["drift"] < 0.2
  assert 0.2 < to["neighbours_kept"] < 0.95


def test_unrelated_embeddings_are_refused_and_nothing_is_written(
  old: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """They share a mean, so that their cosines are large; that is not taken for likeness."""
  rng = np.random.default_rng(5)
  new = embedding_folder.write(tmp_path / "new", rng.normal(size=(USERS, 16)) + 3)
  far = embedding_folder.write(tmp_path / "far", rng.normal(size=(USERS, 16)) + 3)
  arguments = ["align", "--embeddings", str(new), "--to", str(far), "--out", str(tmp_path / "out")]
  assert cli.main(arguments) == 1
  assert "more than --max-drift=0.5; nothing was written" in capsys.readouterr().err
  assert not list(tmp_path.glob("out*"))
  assert cli.main([*arguments, "--max-drift", "2"]) == 0
  to = json.loads((tmp_path / "out" / "manifest.json").read_text())["aligned_to"]
  assert to["after"]["mean_cosine"] > 0.8 and to["drift"] > 0.8
  assert "drift" in capsys.readouterr().out


def test_a_map_of_too_few_users_shows_its_drift_on_the_others(tmp_path: pathlib.Path) -> None:
  """Fitted on 20 users, 32 numbers can be turned to agree on those; the figures are of the others."""
  x, y = (np.random.default_rng(s).normal(size=(40, 32)) for s in (1, 2))
  old, new = embedding_folder.write(tmp_path / "old", x), embedding_folder.write(tmp_path / "new", y)
  pairs = align.shared_users(new, old)
  turn = align.procrustes(pairs.new[pairs.fitted], pairs.old[pairs.fitted])
  np.testing.assert_allclose(turn @ turn.T, np.eye(32), atol=1e-9)
  assert align.row_cosines(pairs.new[pairs.fitted] @ turn, pairs.old[pairs.fitted]).mean() > 0.5
  found = align.measure_alignment(pairs, turn)
  assert found["drift"] > 0.8
  manifest = align.align_embeddings(new, old, tmp_path / "out", max_drift=2)
  assert any("does not determine" in line for line in align.alignment_summary(manifest))


@pytest.mark.parametrize(("wide", "narrow"), [(24, 16), (16, 24)])
def test_of_different_widths_the_narrower_gets_zeros(tmp_path: pathlib.Path, wide: int, narrow: int) -> None:
  """New vectors of 24 numbers that hold the old 16, and of 16 that the old 24 hold."""
  both = vectors(24)
  both[:, 16:] *= 0.1
  full, part = both, both[:, :16]
  old_x, new_x = (part, full @ turned(0, 24)) if wide > narrow else (full, part @ turned(0, 16))
  old = embedding_folder.write(tmp_path / "old", old_x)
  new = embedding_folder.write(tmp_path / "new", new_x)
  manifest = align.align_embeddings(new, old, tmp_path / "out", max_drift=0.2)
  out = embedding_files.embedding_vectors(embedding_files.read_embeddings(tmp_path / "out"))
  assert out.shape == (USERS, 24) and manifest["width"] == 24
  np.testing.assert_allclose(np.linalg.norm(out, axis=1), np.linalg.norm(new_x, axis=1), rtol=1e-5)
  np.testing.assert_allclose(out[:, :16], part, atol=0.05)


def test_without_a_shared_time_each_users_latest_are_matched(tmp_path: pathlib.Path) -> None:
  x = vectors()
  days = ["2024-05-01"] * (USERS // 2) + ["2024-04-01"] * (USERS // 2)
  users = [*range(USERS // 2)] * 2
  old = embedding_folder.write(tmp_path / "old", x, users, days)
  new = embedding_folder.write(tmp_path / "new", x[: USERS // 2] @ turned(0, 16), as_of="2024-06-01")
  to = align.align_embeddings(new, old, tmp_path / "out", max_drift=0.01)["aligned_to"]
  assert to["matched_by"] == "user_id, each one's latest times" and to["shared_users"] == USERS // 2


def test_of_several_shared_times_the_latest_is_matched_once_a_user(tmp_path: pathlib.Path) -> None:
  x = vectors()
  half = USERS // 2
  users = [*range(half)] * 2
  old = embedding_folder.write(tmp_path / "old", x, users, ["2024-04-01"] * half + ["2024-05-01"] * half)
  moved = np.concatenate([x[:half] + 1, x[half:]])
  new = embedding_folder.write(
    tmp_path / "new", moved @ turned(0, 16), users, ["2024-04-01"] * half + ["2024-05-01"] * half
  )
  pairs = align.shared_users(new, old)
  assert len(pairs.new) == half
  np.testing.assert_allclose(pairs.new, (x[half:] @ turned(0, 16)), atol=1e-5)
  np.testing.assert_allclose(pairs.old, x[half:], atol=1e-6)


def test_the_users_without_events_come_along_and_a_refresh_refuses_what_was_turned(
  old: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  new = embedding_folder.write(tmp_path / "new", vectors() @ turned(0, 16))
  pq.write_table(pa.table({"user_id": [9999]}), new / "absent-00000.parquet")
  align.align_embeddings(new, old, tmp_path / "out", max_drift=0.5)
  assert embedding_files.absent_files(tmp_path / "out")[0].read_bytes() == (new / "absent-00000.parquet").read_bytes()
  style = part_files.RowStyle(True, 16, "float32")
  with pytest.raises(ConfigError, match="vectors of two spaces do not belong in one table"):
    incremental.EarlierEmbeddings(tmp_path / "out", types.SimpleNamespace(dataset=None), {}, style)


def test_too_few_shared_users_are_an_error(old: pathlib.Path, tmp_path: pathlib.Path) -> None:
  new = embedding_folder.write(tmp_path / "new", vectors(), [*range(USERS - 5, 2 * USERS - 5)])
  with pytest.raises(DataError, match="share 5 users"):
    align.align_embeddings(new, old, tmp_path / "out", max_drift=1)


def test_what_is_there_stays_unless_told_and_a_failed_write_leaves_it(
  old: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  new = embedding_folder.write(tmp_path / "new", vectors() @ turned(0, 16))
  align.align_embeddings(new, old, tmp_path / "out", max_drift=0.5)
  with pytest.raises(DataError, match="add --overwrite"):
    align.align_embeddings(new, old, tmp_path / "out", max_drift=0.5)
  with pytest.raises(ValueError, match="name another directory"):
    align.align_embeddings(new, old, old, max_drift=0.5, overwrite=True)

  def full(*unused: object) -> None:
    raise OSError("No space left on device")

  before = embedding_files.read_embeddings(tmp_path / "out")
  monkeypatch.setattr(pq, "write_table", full)
  with pytest.raises(DataError, match="No space left on device; nothing was kept"):
    align.align_embeddings(new, old, tmp_path / "out", max_drift=0.5, overwrite=True)
  assert embedding_files.read_embeddings(tmp_path / "out") == before
  assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old", "out"]
