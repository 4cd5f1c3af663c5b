"""Ends of a run that is not done: signals, steps that are not finite, disks that are full or gone."""

import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from supermoe_jax import cli, config, exits, sharding
from supermoe_jax.data import batches
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.training import loop
from supermoe_jax.training.errors import RunError
from supermoe_jax.training.run import Run
from supermoe_jax.training.step import TrainState, compiled, create_state, place
from supermoe_jax.training.stopping import Signals, Stopped


def rows(folder: pathlib.Path) -> list[dict]:
  found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in row.items() if k != "speed"} for row in found]


def assert_equal(folder: pathlib.Path, workdir: pathlib.Path) -> None:
  """Two runs ended alike, to the bit."""
  for mine, wanted in zip(jax.tree.leaves(Run(folder).variables), jax.tree.leaves(Run(workdir).variables), strict=True):
    np.testing.assert_array_equal(mine, wanted)
  assert rows(folder) == rows(workdir)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, do: Callable[[], object]) -> None:
  """Does something while step number `step` of the next run is under way."""
  place, count = loop.place_batch, iter(range(1, 1000))

  def placed(*arguments: object, **named: object) -> object:
    if next(count) == step:
      do()
    return place(*arguments, **named)

  monkeypatch.setattr(loop, "place_batch", placed)


@pytest.mark.parametrize(("name", "step"), [("SIGTERM", 1), ("SIGINT", 5), ("SIGTERM", 8)])
def test_a_signal_saves_within_the_step_and_the_run_goes_on_as_if_there_had_been_none(
  cfg: config.Config,
  dataset: Dataset,
  workdir: pathlib.Path,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  name: str,
  step: int,
) -> None:
  folder, handlers = tmp_path / "run", [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  at_step(monkeypatch, step, lambda: signal.raise_signal(signal.Signals[name]))
  with pytest.raises(Stopped, match=f"{name}: .* is saved at step {step} of 12; the same command goes on"):
    loop.train(cfg, folder, say=lambda _: None)
  assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
  assert max(int(p.name) for p in (folder / "checkpoints").iterdir()) == step
  monkeypatch.undo()
  said: list[str] = []
  assert loop.train(cfg, folder, say=said.append) == 12
  assert any(f"at step {step} of 12" in line for line in said)
  assert_equal(folder, workdir)


def test_a_run_stopped_by_a_signal_exits_with_the_code_that_says_resume(
  cfg: config.Config,
  dataset: Dataset,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  monkeypatch.setattr(config, "load", lambda *_: cfg)
  at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
  assert cli.main(["train", "--config", "any", "--workdir", str(tmp_path / "run")]) == exits.RESUME == 75
  assert "is saved at step 3 of 12; the same command goes on" in capsys.readouterr().err


def test_a_signal_in_the_last_step_ends_a_run_that_is_done_and_two_runs_of_a_seed_are_the_same(
  cfg: config.Config, dataset: Dataset, workdir: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  at_step(monkeypatch, 12, lambda: signal.raise_signal(signal.SIGTERM))
  assert loop.train(cfg, tmp_path / "run", say=lambda _: None) == 12
  assert_equal(tmp_path / "run", workdir)


def test_a_second_interruption_does_not_wait() -> None:
  with Signals() as signals:
    signal.raise_signal(signal.SIGINT)
    assert signals.asked([1]) == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)


def test_outside_the_main_thread_nothing_listens() -> None:
  before, heard = signal.getsignal(signal.SIGTERM), []

  def listen() -> None:
    with Signals() as signals:
      heard.append((signals.asked([1]), signal.getsignal(signal.SIGTERM) == before))

  thread = threading.Thread(target=listen)
  thread.start()
  thread.join()
  assert heard == [("", True)]


# ---------------------------------------------------------------------------------------------------------- not finite


def poisoned(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
  """The weights of the labels of the steps' batches are not finite."""
  place, count = loop.place_batch, iter(range(1, 1000))

  def placed(batch: object, mesh: object, **named: object) -> object:
    batch = place(batch, mesh, **named)
    if next(count) in steps:
      targets = {n: t._replace(weight=t.weight * jnp.nan) for n, t in batch.targets.items()}
      batch = batch._replace(targets=targets)
    return batch

  monkeypatch.setattr(loop, "place_batch", placed)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(cfg: config.Config, dataset: Dataset) -> None:
  cfg = config.override(
    cfg,
    [
      "--config.train.tables.optimizer=adam",
      "--config.train.tables.weight_decay=0.1",
      "--config.train.weighting.method=dwa",
      "--config.train.balance_rate=0.01",
    ],
  )
  mesh = sharding.make_mesh(cfg.train.mesh)
  program = compiled(cfg, dataset.schema, mesh)
  _, state = create_state(cfg, dataset.schema, mesh)
  stream = iter(batches.training(dataset, cfg))
  statistics = loop._measure(dataset, cfg, lambda _: None)
  state, metrics = program.step(state, place(next(stream), mesh), statistics)
  assert int(metrics.skipped) == 0
  before: TrainState = jax.tree.map(np.asarray, state)
  batch = place(next(stream), mesh)
  bad = batch._replace(targets={n: t._replace(weight=t.weight * jnp.inf) for n, t in batch.targets.items()})
  state, metrics = program.step(state, bad, statistics)
  assert int(metrics.skipped) == 1
  assert (int(state.step), int(state.skipped)) == (2, 1)
  after = jax.tree.map(np.asarray, state)
  for (path, mine), wanted in zip(
    jax.tree_util.tree_flatten_with_path(after._replace(step=0, skipped=0))[0],
    jax.tree.leaves(before._replace(step=0, skipped=0)),
    strict=True,
  ):
    np.testing.assert_array_equal(mine, wanted, err_msg=str(path))
  state, metrics = program.step(state, place(next(stream), mesh), statistics)
  assert int(metrics.skipped) == 0 and (int(state.step), int(state.skipped)) == (3, 1)
  assert any((np.asarray(a) != b).any() for a, b in zip(jax.tree.leaves(state.model), jax.tree.leaves(after.model)))


def test_steps_that_are_not_finite_are_skipped_and_told(
  cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  poisoned(monkeypatch, 3, 7)
  said: list[str] = []
  assert loop.train(cfg, tmp_path / "run", say=said.append) == 12
  assert [r["skipped"] for r in rows(tmp_path / "run")] == [[], [3], [], [7], [], []]
  assert all(r["loss"] is not None for r in rows(tmp_path / "run"))
  assert any("the loss or gradients of step 7 are not finite: skipped, 2 by now" in line for line in said)
  assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(Run(tmp_path / "run").variables))


def test_too_many_steps_that_are_not_finite_stop_a_run_with_the_batch_kept(
  cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  cfg = config.override(cfg, ["--config.train.nonfinite_steps=2"])
  seen, put = [], loop.place_batch
  monkeypatch.setattr(
    loop, "place_batch", lambda batch, *rest, **named: (seen.append(batch), put(batch, *rest, **named))[1]
  )
  poisoned(monkeypatch, 3, 5, 6)
  with pytest.raises(
    RunError, match=r"3 steps had a loss.*nonfinite_steps=2\. .*batch of step 6 is kept in .*step_6_process_0\.npz"
  ):
    loop.train(cfg, tmp_path / "run", say=lambda _: None)
  kept = np.load(tmp_path / "run" / "nonfinite" / "step_6_process_0.npz")
  np.testing.assert_array_equal(kept["features.codes"], seen[5].features.codes)
  np.testing.assert_array_equal(kept["targets.quiet.value"], seen[5].targets["quiet"].value)


# ---------------------------------------------------------------------------------------------------------------- disks


def test_a_full_disk_is_an_error_that_leaves_whole_checkpoints(
  cfg: config.Config, dataset: Dataset, workdir: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  write, count = ocp.JsonCheckpointHandler._save_fn, iter(range(100))

  async def full(*arguments: object) -> None:
    if next(count) == 1:  # of step 8, in the background
      raise OSError(28, "No space left on device")
    await write(*arguments)

  folder = tmp_path / "run"
  with monkeypatch.context() as patch:
    patch.setattr(ocp.JsonCheckpointHandler, "_save_fn", full)
    with pytest.raises(RunError, match=r"could not be written to .*No space left on device.*Those that are there are"):
      loop.train(cfg, folder, say=lambda _: None)
  assert Run(folder).step == 4
  assert loop.train(cfg, folder, say=lambda _: None) == 12
  assert_equal(folder, workdir)


def test_a_directory_of_checkpoints_that_is_gone_is_an_error(
  cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  folder = tmp_path / "run"

  def remove() -> None:
    while not (folder / "checkpoints" / "4").is_dir():
      time.sleep(0.01)
    (folder / "checkpoints").rename(folder / "elsewhere")

  at_step(monkeypatch, 6, remove)
  with pytest.raises(RunError, match="checkpoints is gone; step 8 is not saved"):
    loop.train(cfg, folder, say=lambda _: None)
  assert [p.name for p in (folder / "elsewhere").iterdir()] == ["4"]
  assert not (folder / "checkpoints").exists()
