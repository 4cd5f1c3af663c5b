"""A prepared dataset with a task of every kind."""

import pathlib

import pytest
from rich_log import rich_config, write_rich_log

from supermoe_jax import config
from supermoe_jax.data import prepare
from supermoe_jax.data.dataset import Dataset


@pytest.fixture(scope="session")
def rich(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
  folder: pathlib.Path = tmp_path_factory.mktemp("rich")
  write_rich_log(folder)
  cfg = config.resolve(rich_config(folder))
  prepare.prepare(cfg)
  return cfg


@pytest.fixture(scope="session")
def rich_dataset(rich: config.Config) -> Dataset:
  return Dataset(rich.data.path)
