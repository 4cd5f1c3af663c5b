"""A checkpoint that is damaged is told from a whole one, and the one before it is used."""

import itertools
import pathlib
import shutil
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supermoe_jax import config, device_mesh, sharding
from supermoe_jax.errors import RunError
from supermoe_jax.training import loop
from supermoe_jax.training.checkpoints import checksums
from supermoe_jax.training.checkpoints.checkpoint import Checkpoints, CheckpointWriter
from supermoe_jax.training.run import Run
from supermoe_jax.training.step import TrainState
from tests.fixtures.messages import messages
from tests.fixtures.small_state import state


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in folder.rglob("*") if p.is_file())


def truncate(file: pathlib.Path) -> None:
  content = file.read_bytes()
  file.write_bytes(content[: len(content) // 2])


def flip(file: pathlib.Path) -> None:
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 0x10
  file.write_bytes(bytes(content))


def leaves(state: TrainState) -> list[np.ndarray]:
  return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.fixture
def copy(workdir: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(workdir, tmp_path / "copy"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Checkpoints of two steps, of states in which no number is the same."""
  folder = tmp_path_factory.mktemp("saved")
  with CheckpointWriter(folder, config.Train()) as writer:
    for step in (1, 2):
      writer.save(step, state(37, (1, 1, 1), step), {"at": step}, {})
      writer.wait()
  return folder


class States(NamedTuple):
  fresh: TrainState
  written: dict[int, list[np.ndarray]]  # the leaves of each step's state


@pytest.fixture(scope="module")
def states() -> States:
  return States(state(37, (1, 1, 1), 0), {step: leaves(state(37, (1, 1, 1), step)) for step in (1, 2)})


def assert_read(folder: pathlib.Path, states: States, damaged: str) -> int:
  """What is read is what was written, of the newest checkpoint or, which is said, of the one before; returns which."""
  with messages() as said:
    found = Checkpoints(folder).restore(states.fresh)
  assert found is not None
  step = int(found.state.step)
  assert (step == 1) == any("checkpoint 2 of" in line and "cannot be used" in line for line in said), damaged
  assert found.position == {"at": step}
  for mine, wanted in zip(leaves(found.state), states.written[step], strict=True):
    np.testing.assert_array_equal(mine, wanted, err_msg=damaged)
  return step


DAMAGES = (truncate, flip, pathlib.Path.unlink)


@pytest.mark.parametrize(
  "damages",
  [DAMAGES, *(pytest.param((one,), marks=pytest.mark.nightly) for one in DAMAGES)],
  ids=lambda damages: " ".join(d.__name__ for d in damages),
)
def test_whatever_is_damaged_what_is_read_is_what_was_written(
  saved: pathlib.Path,
  tmp_path: pathlib.Path,
  states: States,
  damages: tuple[Callable[[pathlib.Path], None], ...],
) -> None:
  """One file after the other is damaged, in one way after the other."""
  assert assert_read(saved, states, "nothing") == 2
  used = set()
  for file, damage in zip(files(saved / "checkpoints" / "2"), itertools.cycle(damages)):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    damage(copy / file.relative_to(saved))
    used.add(assert_read(copy, states, f"{file}: {damage.__name__}"))
    shutil.rmtree(copy)
  assert 1 in used


def test_every_flipped_byte_of_what_a_checkpoint_says_of_itself_is_noticed(
  saved: pathlib.Path, tmp_path: pathlib.Path, states: States
) -> None:
  copy = pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))
  words = copy / "checkpoints" / "2" / "run" / "metadata"
  content = words.read_bytes()
  for place in range(0, len(content), max(1, len(content) // 20)):
    changed = bytearray(content)
    changed[place] ^= 1
    words.write_bytes(bytes(changed))
    assert assert_read(copy, states, str(place)) == 1


def test_without_a_whole_checkpoint_a_run_is_an_error_and_nothing_is_overwritten(
  copy: pathlib.Path, cfg: config.Config
) -> None:
  for step in ("8", "12"):
    truncate(copy / "checkpoints" / step / "run" / "metadata")
  before = {p: p.read_bytes() for p in files(copy)}
  with pytest.raises(RunError, match=r"no checkpoint of .* can be used \(12: .*; 8: .*\).*nothing was changed"):
    loop.train(cfg, copy)
  with pytest.raises(RunError, match="no checkpoint of"):
    Run(copy)
  assert {p: p.read_bytes() for p in files(copy)} == before


def test_evaluating_leaves_a_damaged_checkpoint_where_it_is(copy: pathlib.Path) -> None:
  truncate(copy / "checkpoints" / "12" / "model" / "_METADATA")
  before = {p: p.read_bytes() for p in files(copy)}
  assert Run(copy).step == 8
  assert {p: p.read_bytes() for p in files(copy)} == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "bool", "int8"])
def test_one_changed_bit_changes_a_digest(dtype: str) -> None:
  rng = np.random.default_rng(0)
  value = np.asarray(jnp.asarray(rng.integers(0, 2, (3, 5, 4)), dtype))
  digests = {checksums.array_checksums({"a": jnp.asarray(value)})["a"]}
  bits = 1 if dtype == "bool" else 8 * value.dtype.itemsize
  places = [(i, b) for i in (0, 7, 59) for b in range(bits)]
  for place, bit in places:
    raw = bytearray(value.tobytes())
    raw[place * value.dtype.itemsize + bit // 8] ^= 1 << bit % 8
    changed = np.frombuffer(bytes(raw), value.dtype).reshape(value.shape)
    digests.add(checksums.array_checksums({"a": jnp.asarray(changed)})["a"])
  assert len(digests) == 1 + len(places)


def test_a_digest_knows_the_place_of_a_value_and_not_the_mesh() -> None:
  value = jnp.arange(64.0).reshape(8, 8)
  mesh = device_mesh.make_mesh(config.Mesh(data=2, expert=2, tensor=2))
  layout = jax.sharding.NamedSharding(mesh, sharding.spec(None, "rows"))
  assert checksums.array_checksums([value]) == checksums.array_checksums([jax.device_put(value, layout)])
  assert checksums.array_checksums([value]) != checksums.array_checksums([value.T])


def test_arrays_other_than_those_whose_digests_were_kept_are_not_used(
  states: States, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """As if memory had changed between the digest and the disk: every file is whole by itself."""
  real = checksums.array_checksums
  with CheckpointWriter(tmp_path, config.Train()) as writer:
    writer.save(1, state(37, (1, 1, 1), 1), {"at": 1}, {})
    writer.wait()
    with monkeypatch.context() as patch:
      patch.setattr(
        checksums, "array_checksums", lambda tree: {n: d ^ (i == 0) for i, (n, d) in enumerate(real(tree).items())}
      )
      writer.save(2, state(37, (1, 1, 1), 2), {"at": 2}, {})
      writer.wait()
  assert assert_read(tmp_path, states, "a digest") == 1
