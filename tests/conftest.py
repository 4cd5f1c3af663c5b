"""Eight host devices for every test, and one small run of the whole way that many tests look at."""

import collections
import os
import pathlib
from collections.abc import Iterator

# Most of the time goes into compiling: LLVM does without its optimizations, which leaves XLA's own passes as they are.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import pytest

pytest.register_assert_rewrite("tests.fixtures")  # before the first import

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.preparation import prepare
from supermoe_jax.training import loop
from supermoe_jax.training.run import Run
from tests.fixtures import compilation, small_log
from tests.fixtures.scripts import ROOT
from tests.fixtures.shared import made_once

pytest_plugins = ["tests.fixtures.time_report"]

NIGHTLY = pathlib.Path(__file__).with_name("nightly")
QUICK = "not nightly"  # the marks that `make test` selects


def pytest_configure() -> None:
  compilation.keep_programs(ROOT / ".cache" / "compiled")
  compilation.hold_more_programs()


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
  """The quick tier does not import the folder `nightly`, whose tests need more than the extra `test`."""
  return True if collection_path == NIGHTLY and config.option.markexpr == QUICK else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Marks the folder `nightly`, and begins with slow files, so that in the end no process waits long for another."""
  for item in items:
    if NIGHTLY in item.path.parents:
      item.add_marker("nightly")
  slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
  items.sort(key=lambda item: -slow[item.path])  # stable: a file stays together


@pytest.fixture(scope="module")
def compiled_afresh() -> Iterator[None]:
  """For tests that compare bits: every training program of the module is compiled, none is loaded from the disk."""
  with compilation.compiled_afresh():
    yield


@pytest.fixture(scope="session")
def log_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The small log's files, and its dataset in `dataset`; do not change them."""

  def make(folder: pathlib.Path) -> None:
    small_log.write_log(folder)
    prepare.prepare(config.resolve(small_log.raw_config(folder)))

  return made_once(tmp_path_factory, "small", make)


@pytest.fixture(scope="session")
def cfg(log_folder: pathlib.Path) -> config.Config:
  return config.resolve(small_log.raw_config(log_folder))


@pytest.fixture(scope="session")
def dataset(cfg: config.Config) -> Dataset:
  return Dataset(cfg.data.path)


@pytest.fixture(scope="session")
def workdir(cfg: config.Config, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A run trained to its end, by programs that were compiled for it; do not change it."""

  def make(folder: pathlib.Path) -> None:
    with compilation.compiled_afresh():
      assert loop.train(cfg, folder) == cfg.train.steps

  return made_once(tmp_path_factory, "run", make)


@pytest.fixture(scope="session")
def run(workdir: pathlib.Path) -> Run:
  return Run(workdir)


@pytest.fixture(scope="session")
def every_task(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
  """A config of the small log with a task of every kind, and its dataset; do not change what lies in its folder."""

  def make(folder: pathlib.Path) -> None:
    small_log.write_log(folder)
    prepare.prepare(config.resolve(small_log.every_task_config(folder)))

  return config.resolve(small_log.every_task_config(made_once(tmp_path_factory, "every_task", make)))


@pytest.fixture(scope="session")
def every_task_dataset(every_task: config.Config) -> Dataset:
  return Dataset(every_task.data.path)
