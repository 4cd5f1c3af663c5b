"""Eight host devices for every test, and one small run of the whole way that many tests look at."""

import collections
import os
import pathlib

# Most of the time goes into compiling: LLVM does without its optimizations, which leaves XLA's own passes as they are.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax
import pytest
from small_log import raw_config, write_log

from supermoe_jax import config
from supermoe_jax.data import prepare
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.training import loop
from supermoe_jax.training.run import Run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Begins with the files that have slow tests, so that in the end no process waits long for another."""
  slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
  items.sort(key=lambda item: -slow[item.path])  # stable: a file stays together


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
  folder = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share what they compile
    folder = folder.parent
  jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session")
def log_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("log")
  write_log(folder)
  return folder


@pytest.fixture(scope="session")
def cfg(log_folder: pathlib.Path) -> config.Config:
  return config.resolve(raw_config(log_folder))


@pytest.fixture(scope="session")
def dataset(cfg: config.Config) -> Dataset:
  prepare.prepare(cfg)
  return Dataset(cfg.data.path)


@pytest.fixture(scope="session")
def workdir(cfg: config.Config, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A run trained to its end; do not change it."""
  path = tmp_path_factory.mktemp("run")
  assert loop.train(cfg, path) == cfg.train.steps
  return path


@pytest.fixture(scope="session")
def run(workdir: pathlib.Path) -> Run:
  return Run(workdir)
