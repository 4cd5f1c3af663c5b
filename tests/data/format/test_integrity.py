"""A dataset directory that is not as it was written is an error, and never a wrong batch."""

import json
import pathlib
import shutil
import types

import pytest

from supermoe_jax import config
from supermoe_jax.data.append import append
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.format import integrity
from supermoe_jax.errors import DataError
from tests.fixtures import scripts
from tests.fixtures.new_visits import write_visits


@pytest.fixture(scope="module")
def corruption() -> types.ModuleType:
  return scripts.load(scripts.BENCHMARKS / "corruption.py")


@pytest.fixture
def copy(dataset: Dataset, tmp_path: pathlib.Path) -> pathlib.Path:
  shutil.copytree(dataset.path, tmp_path / "dataset")
  return tmp_path / "dataset"


@pytest.mark.parametrize("trials", [60, pytest.param(1000, marks=pytest.mark.nightly)])
def test_damage_is_noticed_or_harmless(
  appendable: config.Config, tmp_path: pathlib.Path, corruption: types.ModuleType, trials: int
) -> None:
  """Of a dataset that was appended to: only then is the table of users read."""
  path = pathlib.Path(appendable.data.path)
  append.append(path, {"visits": [write_visits(tmp_path, "day.parquet", 3, ["page0"])]})
  found = corruption.trials(path, trials)
  assert {outcome for _, _, outcome in found} <= {"error", "unchanged"}
  noticed = {(kind, what) for kind, what, outcome in found if outcome == "error"}
  assert {kind for kind, _ in noticed} == {"shard", "manifest", "users", "other file"}
  if trials > 100:  # by then every kind was cut, and some of the bytes were padding
    assert len(noticed) == 2 * 4 and "unchanged" in {outcome for _, _, outcome in found}


@pytest.mark.parametrize("kind", ["shard", "manifest", "users", "other file"])
def test_a_file_that_was_cut_is_an_error(copy: pathlib.Path, corruption: types.ModuleType, kind: str) -> None:
  file = next(f for f in sorted(copy.rglob("*")) if f.is_file() and corruption.kind_of(f.relative_to(copy)) == kind)
  file.write_bytes(file.read_bytes()[:-2])
  with pytest.raises(DataError, match=rf"{file.name}.* is damaged"):
    Dataset(copy)


def test_the_trials_see_a_wrong_record(
  dataset: Dataset, corruption: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Without the digests of the small files, damage to them is not always noticed: the trials can fail."""
  monkeypatch.setattr(integrity, "_check", lambda *unused: None)
  monkeypatch.setattr(integrity, "_own_digest", lambda manifest: manifest.get("digest"))
  found = corruption.trials(dataset.path, 40, seed=7)
  assert {outcome for _, _, outcome in found} - {"error", "unchanged"}


@pytest.mark.parametrize("name", ["encoders/encoders.json", "event_log/1.0.0/features.json"])
def test_the_file_that_is_damaged_is_named(copy: pathlib.Path, name: str) -> None:
  data = bytearray((copy / name).read_bytes())
  data[len(data) // 2] ^= 1
  (copy / name).write_bytes(data)
  with pytest.raises(DataError, match=rf"{name} is damaged: .*prepare again"):
    Dataset(copy)


def test_a_shard_that_was_cut_is_named_with_its_size(copy: pathlib.Path) -> None:
  (shard,) = copy.rglob("*.array_record*")
  size = shard.stat().st_size
  shard.write_bytes(shard.read_bytes()[:-100])
  with pytest.raises(DataError, match=rf"{shard.name} is damaged: it has {size - 100:,} bytes, {size:,} were written"):
    Dataset(copy)


def test_a_damaged_record_is_an_error_when_it_is_read(copy: pathlib.Path) -> None:
  (shard,) = copy.rglob("*.array_record*")
  data = bytearray(shard.read_bytes())
  data[200] ^= 1
  shard.write_bytes(data)
  damaged = Dataset(copy)
  with pytest.raises(DataError, match=r"record \d+ of .* is damaged .*prepare the dataset again"):
    for index in range(len(damaged)):
      damaged[index]


def test_a_shard_without_its_beginning_is_an_error_when_the_dataset_is_opened(copy: pathlib.Path) -> None:
  (shard,) = copy.rglob("*.array_record*")
  shard.write_bytes(bytes(shard.stat().st_size))
  with pytest.raises(DataError, match=r"a shard of .* is damaged .*prepare the dataset again"):
    Dataset(copy)


def test_a_manifest_that_was_edited_is_noticed(copy: pathlib.Path) -> None:
  file = copy / "manifest.json"
  manifest = json.loads(file.read_text())
  file.write_text(json.dumps({**manifest, "users": manifest["users"] + 1}))
  with pytest.raises(DataError, match="its content does not match its digest"):
    Dataset(copy)
  file.write_text(json.dumps(manifest))  # laid out otherwise, and the same content
  assert Dataset(copy).manifest == manifest
