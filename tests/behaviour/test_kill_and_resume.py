"""A run can be disturbed anywhere: it goes on from its last checkpoint and ends as if nothing had been.

Here a run is cut in this process, which leaves the files that a kill leaves; `test_kill_and_resume_processes.py` kills
processes.
"""

import json
import os
import pathlib
import shutil
import signal
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from supermoe_jax import cli, config, device_mesh
from supermoe_jax.batch import Batch
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.errors import ExitCode, RunError, Stopped
from supermoe_jax.training import loop
from supermoe_jax.training.monitoring import profiler
from supermoe_jax.training.run import Run
from supermoe_jax.training.step import compiled_program
from tests.fixtures import short_runs
from tests.fixtures.messages import messages
from tests.fixtures.short_runs import assert_same_end, at_step, parameters, rows, steps_saved

pytestmark = pytest.mark.usefixtures("compiled_afresh")


@pytest.fixture(scope="module")
def short(cfg: config.Config, dataset: Dataset) -> config.Config:
  del dataset  # it is there
  return short_runs.short(cfg)


@pytest.fixture(scope="module")
def whole(
  short: config.Config, dataset: Dataset, compiled_afresh: None, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
  """A run that nothing disturbed; do not change it."""
  folder = tmp_path_factory.mktemp("whole")
  assert loop.train(short, folder) == 8
  step = compiled_program(short, dataset.schema, device_mesh.make_mesh(short.train.mesh)).step
  assert step._cache_size() == 1  # it was compiled once
  return folder


@pytest.fixture
def six(whole: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """A copy of that run that stands at step 6 of 8."""
  copy = pathlib.Path(shutil.copytree(whole, tmp_path / "six"))
  shutil.rmtree(copy / "checkpoints" / "8")
  return copy


class Killed(BaseException):
  """Nothing catches it."""


def cut(cfg: config.Config, folder: pathlib.Path, step: int) -> None:
  """Trains until a step is under way, and leaves what a kill leaves: a half-written checkpoint, and half a row."""

  def kill() -> NoReturn:
    raise Killed

  with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
    at_step(patch, step, kill)
    loop.train(cfg, folder)
  saved = [folder / "checkpoints" / str(step) for step in steps_saved(folder)]
  half = folder / "checkpoints" / "7.orbax-checkpoint-tmp"
  shutil.copytree((saved or [folder / "hosts"])[-1], half)
  (half / "_CHECKPOINT_METADATA").unlink(missing_ok=True)
  if saved:
    with (folder / "metrics.jsonl").open("a") as file:
      file.write('{"step": 7, "lo')


def signalled(cfg: config.Config, folder: pathlib.Path, name: str, step: int, saved: int) -> list[str]:
  """Trains until a signal comes, in step number `step` of this process, which is saved as `saved`."""
  handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  with pytest.MonkeyPatch.context() as patch, messages() as said:
    at_step(patch, step, lambda: signal.raise_signal(signal.Signals[name]))
    with pytest.raises(Stopped, match=f"{name}: .* is saved at step {saved} of 8; the same command goes on"):
      loop.train(cfg, folder)
  assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
  assert max(steps_saved(folder)) == saved
  return said


# ------------------------------------------------------------------------------------------------------ kills, signals


@pytest.mark.slow
def test_a_run_that_is_killed_and_stopped_again_and_again_ends_bitwise_as_if_it_had_not_been(
  short: config.Config, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  folder = tmp_path / "run"
  cut(short, folder, 1)
  assert steps_saved(folder) == [] and rows(folder) == []
  said = signalled(short, folder, "SIGTERM", 1, saved=1)  # begins again
  assert not any("resuming" in line for line in said)
  assert not list((folder / "checkpoints").glob("*tmp*"))

  cut(short, folder, 5)
  assert max(steps_saved(folder)) == 3
  written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]
  assert [row["step"] for row in written] == [2, 4]  # one after the checkpoint
  said = signalled(short, folder, "SIGINT", 2, saved=5)
  assert f"resuming {folder} at step 3 of 8" in said
  with messages() as said:
    assert loop.train(short, folder) == 8
  assert f"resuming {folder} at step 5 of 8" in said
  assert not list((folder / "checkpoints").glob("*tmp*"))
  assert_same_end(folder, whole)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize(("name", "step"), [("SIGTERM", 3), ("SIGINT", 6), ("SIGTERM", 7)])
def test_a_signal_at_any_step_saves_within_it(
  short: config.Config, whole: pathlib.Path, tmp_path: pathlib.Path, name: str, step: int
) -> None:
  signalled(short, tmp_path / "run", name, step, saved=step)
  assert loop.train(short, tmp_path / "run") == 8
  assert_same_end(tmp_path / "run", whole)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 4, 8])  # in that of a checkpoint, just after it, and in the last
def test_a_run_cut_at_any_step_ends_as_if_it_had_not_been(
  short: config.Config, whole: pathlib.Path, tmp_path: pathlib.Path, step: int
) -> None:
  cut(short, tmp_path / "run", step)
  assert loop.train(short, tmp_path / "run") == 8
  assert_same_end(tmp_path / "run", whole)


def test_a_run_stopped_by_a_signal_exits_with_the_code_that_says_resume(
  short: config.Config, six: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  monkeypatch.setattr(config, "load", lambda *_: short)
  at_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
  assert cli.main(["train", "--config", "any", "--workdir", str(six)]) == ExitCode.RESUME == 75
  assert "is saved at step 7 of 8; the same command goes on" in capsys.readouterr().err


def test_a_signal_in_the_last_step_ends_a_run_that_is_done_and_a_profile_changes_no_bit(
  short: config.Config, whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(profiler, "SKIPPED", 2)
  at_step(monkeypatch, 8, lambda: signal.raise_signal(signal.SIGTERM))
  assert loop.train(short, tmp_path / "run", profile=True) == 8
  assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
  assert_same_end(tmp_path / "run", whole)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_ends_as_ever(
  short: config.Config, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  copy = pathlib.Path(shutil.copytree(whole, tmp_path / "copy"))
  newest = copy / "checkpoints" / "8"
  for file in newest.joinpath("model").rglob("d/*"):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
  content = {p.name: p.read_bytes() for p in newest.rglob("*") if p.is_file()}
  with messages() as said:
    assert loop.train(short, copy) == 8
  assert any("warning: checkpoint 8 of" in line for line in said)
  assert f"resuming {copy} at step 6 of 8" in said
  kept = copy / "damaged" / "8"  # for whoever wants to know
  assert {p.name: p.read_bytes() for p in kept.rglob("*") if p.is_file()} == content
  assert_same_end(copy, whole)


def test_a_full_disk_is_an_error_that_leaves_whole_checkpoints(
  short: config.Config, whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  write, count = ocp.JsonCheckpointHandler._save_fn, iter(range(100))

  async def full(*arguments: object) -> None:
    if next(count) == 1:  # of step 6, in the background
      raise OSError(28, "No space left on device")
    await write(*arguments)

  folder = tmp_path / "run"
  with monkeypatch.context() as patch:
    patch.setattr(ocp.JsonCheckpointHandler, "_save_fn", full)
    with pytest.raises(RunError, match=r"could not be written to .*No space left on device.*Those that are there are"):
      loop.train(short, folder)
  assert Run(folder).step == 3
  assert loop.train(short, folder) == 8
  assert_same_end(folder, whole)


def test_a_directory_of_checkpoints_that_is_gone_is_an_error(
  short: config.Config, six: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  there = steps_saved(six)
  at_step(monkeypatch, 1, lambda: (six / "checkpoints").rename(six / "elsewhere"))
  with pytest.raises(RunError, match="checkpoints is gone; step 8 is not saved"):
    loop.train(short, six)
  assert sorted(int(p.name) for p in (six / "elsewhere").iterdir()) == there
  assert not (six / "checkpoints").exists()


# ---------------------------------------------------------------------------------------------------------- not finite


def test_steps_that_are_not_finite_are_skipped_and_told_and_too_many_stop_a_run_with_the_batch_kept(
  short: config.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  cfg, folder = config.override(short, ["--config.train.nonfinite_steps=2"]), tmp_path / "run"
  put, seen = loop.place_on_mesh, []

  def poisoned(batch: Batch, mesh: jax.sharding.Mesh, **named: object) -> Batch:
    seen.append(batch)
    batch = put(batch, mesh, **named)
    if len(seen) in (2, 5, 7):  # the weights of the labels are not finite
      batch = batch._replace(targets={n: t._replace(weight=t.weight * jnp.nan) for n, t in batch.targets.items()})
    return batch

  monkeypatch.setattr(loop, "place_on_mesh", poisoned)
  stopped = r"3 steps had a loss.*nonfinite_steps=2\. .*batch of step 7 is kept in .*step_7_process_0\.npz"
  with messages() as said, pytest.raises(RunError, match=stopped):
    loop.train(cfg, folder)
  assert [r["skipped"] for r in rows(folder)] == [[2], [], [5], [7]]
  assert all(r["loss"] is not None for r in rows(folder))
  assert any("the loss or gradients of step 5 are not finite: skipped, 2 by now" in line for line in said)
  assert steps_saved(folder)[-1] == 6 and all(np.isfinite(leaf).all() for leaf in parameters(folder))
  kept = np.load(folder / "nonfinite" / "step_7_process_0.npz")
  np.testing.assert_array_equal(kept["features.codes"], seen[6].features.codes)
  np.testing.assert_array_equal(kept["targets.quiet.value"], seen[6].targets["quiet"].value)


def test_parameters_that_are_not_finite_are_never_saved(
  short: config.Config, six: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  assert bool(loop._all_finite({"a": jnp.ones(2), "b": jnp.ones(3)}))
  for bad in (jnp.nan, jnp.inf, -jnp.inf):
    assert not bool(loop._all_finite({"a": jnp.ones(2), "b": jnp.array([1, bad, 1])}))
  there = steps_saved(six)
  monkeypatch.setattr(loop, "_all_finite", lambda params: False)
  with pytest.raises(RunError, match="no longer finite at step 8; nothing was saved"):
    loop.train(short, six)
  assert steps_saved(six) == there


# ------------------------------------------------------------------------------------------------ several steps a call


def several_steps_a_call(short: config.Config, folder: pathlib.Path, whole: pathlib.Path) -> None:
  """Trains two steps a call, in a new folder or from a checkpoint on, and compares with a run of single steps."""
  several = config.override(short, ["--config.train.steps_per_call=2", "--config.train.checkpoint_every=4"])
  if (folder / "config.json").is_file():
    config.save(several, folder / "config.json")
  assert loop.train(several, folder) == 8
  for mine, wanted in zip(rows(folder), rows(whole), strict=True):
    assert mine["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert (mine["step"], mine["events"], mine["tables"]) == (wanted["step"], wanted["events"], wanted["tables"])
  for mine, wanted in zip(parameters(folder), parameters(whole), strict=True):
    np.testing.assert_allclose(mine, wanted, atol=1e-5)


@pytest.mark.slow
def test_several_steps_a_call_are_the_same_steps(short: config.Config, whole: pathlib.Path, six: pathlib.Path) -> None:
  several_steps_a_call(short, six, whole)


@pytest.mark.nightly
@pytest.mark.slow
def test_a_run_of_several_steps_a_call_has_the_same_steps(
  short: config.Config, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  several_steps_a_call(short, tmp_path / "run", whole)
