"""What a run leaves, and what it is trained and opened with; its ends are in `behaviour/test_kill_and_resume.py`."""

import pathlib
import shutil

import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.format import integrity
from supermoe_jax.errors import DataError, RunError
from supermoe_jax.training import loop
from supermoe_jax.training.run import Run
from tests.fixtures.messages import messages
from tests.fixtures.short_runs import rows


@pytest.fixture
def copy(workdir: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(workdir, tmp_path / "copy"))


def test_metrics_have_a_row_every_few_steps_with_every_task(workdir: pathlib.Path, cfg: config.Config) -> None:
  assert [r["step"] for r in rows(workdir)] == [2, 4, 6, 8, 10, 12]
  last = rows(workdir)[-1]
  assert set(last["tasks"]) == set(cfg.active_tasks)
  assert sum(last["load"][0]) == pytest.approx(1, abs=1e-3)
  assert 0 <= last["dropped_share"] < 1
  assert list((workdir / "tensorboard").iterdir())


def test_training_lowers_the_loss(workdir: pathlib.Path) -> None:
  first, *_, last = rows(workdir)
  assert last["loss"] < first["loss"]


def test_a_finished_run_is_left_alone(copy: pathlib.Path, cfg: config.Config) -> None:
  before = (copy / "metrics.jsonl").read_bytes()
  with messages() as said:
    assert loop.train(cfg, copy) == 12
  assert "already trained" in said[-1]
  assert (copy / "metrics.jsonl").read_bytes() == before


def test_another_config_in_the_same_run_directory_is_an_error(copy: pathlib.Path, cfg: config.Config) -> None:
  other = config.override(cfg, ["--config.train.learning_rate=0.5"])
  with pytest.raises(RunError, match=r"config\.train\.learning_rate: 0\.001 → 0\.5.*Name another --workdir"):
    loop.train(other, copy)


def test_training_without_a_dataset_is_an_error(cfg: config.Config, tmp_path: pathlib.Path) -> None:
  gone = config.override(cfg, [f"--config.data.path={tmp_path / 'nothing'}"])
  with pytest.raises(DataError, match="run 'supermoe prepare' first"):
    loop.train(gone, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_training_on_a_dataset_of_another_config_is_an_error(
  cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path
) -> None:
  other = config.override(cfg, ["--config.tasks.quiet.horizon_days=3"])
  with pytest.raises(DataError, match="was prepared with another configuration"):
    loop.train(other, tmp_path / "run")


def test_a_run_without_a_checkpoint_cannot_be_opened(
  cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path
) -> None:
  config.save(cfg, tmp_path / "config.json")
  with pytest.raises(RunError, match="holds no checkpoint yet"):
    Run(tmp_path)


def test_a_checkpoint_of_another_model_is_an_error(copy: pathlib.Path, cfg: config.Config) -> None:
  config.save(config.override(cfg, ["--config.model.d_expert=24"]), copy / "config.json")
  with pytest.raises(RunError, match="does not fit this model"):
    Run(copy)


def test_a_dataset_that_came_out_otherwise_does_not_fit_a_trained_run(
  copy: pathlib.Path, cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path
) -> None:
  data = pathlib.Path(shutil.copytree(dataset.path, tmp_path / "dataset"))
  moved = config.override(cfg, [f"--config.data.path={data}"])
  config.save(moved, copy / "config.json")
  Run(copy)
  integrity.write_manifest(data, {**Dataset(data).manifest, "encoding_hash": "another"})
  with pytest.raises(RunError, match="was prepared again since"):
    Run(copy)
  with pytest.raises(RunError, match="was prepared again since"):
    loop.train(moved, copy)


def test_a_run_of_many_devices_opens_and_goes_on_on_one(copy: pathlib.Path, cfg: config.Config) -> None:
  wide = config.override(cfg, ["--config.train.mesh.data=8"])
  assert loop.train(wide, copy) == 12
  config.save(
    config.override(cfg, ["--config.train.mesh.data=8", "--config.train.mesh.tensor=2"]), copy / "config.json"
  )
  assert dict(Run(copy).mesh.shape) == {"data": 1, "expert": 1, "tensor": 1}
