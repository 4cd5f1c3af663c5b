"""Checkpoints of tables: written on one mesh, read on another, with other stripes and with more rows."""

import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import config
from supermoe_jax.errors import RunError
from supermoe_jax.layers.table import EmbeddingTable, Layout
from supermoe_jax.training.checkpoints.checkpoint import Checkpoints, CheckpointWriter
from supermoe_jax.training.step import TrainState
from tests.fixtures.grids import quick_few
from tests.fixtures.small_state import D, state


def natural(value: jax.Array, size: int) -> np.ndarray:
  value = np.asarray(value)
  return value.reshape(-1, *((D,) if value.ndim == 3 else ()))[:size]


def entries(of: TrainState, size: int) -> dict[str, np.ndarray]:
  """All that has an entry a row, by code."""
  head, mu = of.model["head"]["bias"], of.optimizer[0].mu["head"]["bias"]
  found = {"rows": of.model["items"]["rows"].get_value(), "bias": head.get_value(), "mu": mu.get_value()}
  return {n: natural(v, size) for n, v in {**found, **of.slots["items"]}.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, TrainState]:
  folder, written = tmp_path_factory.mktemp("run"), state(37, (2, 2, 2), 1)
  with CheckpointWriter(folder, config.Train()) as writer:
    writer.save(1, written, {"at": 5}, {})
  return folder, written


ON_CPUS = [(sizes, "cpu") for sizes in ((1, 1, 1), (8, 1, 1), (1, 4, 2), (3, 1, 1), (5, 1, 1))]


@pytest.mark.parametrize(
  ("sizes", "platform"),
  quick_few([((3, 1, 1), "cpu"), ((8, 1, 1), "tpu")], [*ON_CPUS, ((8, 1, 1), "tpu")]),
)
def test_a_table_is_read_onto_any_mesh(
  saved: tuple[pathlib.Path, TrainState], sizes: tuple[int, int, int], platform: str
) -> None:
  folder, written = saved
  mine = state(37, sizes, 0, platform=platform)
  read = Checkpoints(folder).restore(mine)
  assert read is not None
  assert read.position == {"at": 5} and int(read.state.step) == 1
  for name, wanted in entries(written, 37).items():
    np.testing.assert_array_equal(entries(read.state, 37)[name], wanted, err_msg=name)
  for leaf, like in zip(jax.tree.leaves(read.state), jax.tree.leaves(mine), strict=True):
    assert leaf.shape == like.shape and leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


@pytest.mark.parametrize(
  ("sizes", "platform"),
  quick_few([((1, 1, 1), "cpu")], [((1, 1, 1), "cpu"), ((8, 1, 1), "cpu"), ((8, 1, 1), "tpu")]),
)
def test_a_table_grows_by_rows_and_keeps_those_that_it_had(
  saved: tuple[pathlib.Path, TrainState], sizes: tuple[int, int, int], platform: str
) -> None:
  folder, written = saved
  mine = state(300, sizes, 0, platform=platform)
  found, variables = Checkpoints(folder).restore(mine), Checkpoints(folder).restore_model(mine.model)
  assert found is not None and variables is not None
  read, model = found.state, variables.variables
  wanted, fresh, got = (entries(*of) for of in ((written, 37), (mine, 300), (read, 300)))
  for name in wanted:
    np.testing.assert_array_equal(got[name][:37], wanted[name], err_msg=name)
  np.testing.assert_array_equal(got["rows"][37:], fresh["rows"][37:])  # as they began
  assert np.abs(got["rows"][37:]).min() > 0
  assert not any(got[name][37 + 3 :].any() for name in ("mean", "square", "steps"))  # beyond the padding of the 37
  rows = natural(model["items"]["rows"].get_value(), 300)
  np.testing.assert_array_equal(rows[:37], wanted["rows"])
  assert not rows[37:].any()  # an untrained value says nothing


def test_rows_that_share_lines_are_read_where_they_do_not(tmp_path: pathlib.Path) -> None:
  written = state(300, (2, 2, 2), 1, platform="tpu")
  with CheckpointWriter(tmp_path, config.Train()) as writer:
    writer.save(1, written, {"at": 5}, {})
  mine = state(300, (1, 1, 1), 0)
  read = Checkpoints(tmp_path).restore(mine)
  assert read is not None and read.state.model["items"]["rows"].get_value().shape[-1] == D
  assert written.model["items"]["rows"].get_value().shape[-1] == 128
  for name, wanted in entries(written, 300).items():
    np.testing.assert_array_equal(entries(read.state, 300)[name], wanted, err_msg=name)


@pytest.mark.parametrize("width", quick_few([128], [8, 128]))  # 128 is also 32 rows of four, side by side
def test_another_width_is_an_error(width: int, saved: tuple[pathlib.Path, TrainState]) -> None:
  with pytest.raises(RunError, match="does not fit this model"):
    Checkpoints(saved[0]).restore(state(37, (1, 1, 1), 0, d=width))


def test_a_larger_table_begins_as_a_smaller_one_whatever_its_stripes() -> None:
  small, large = (EmbeddingTable(size, D, layout=Layout(ways), rngs=nnx.Rngs(0)) for size, ways in ((37, 1), (5000, 8)))
  assert small.rows.shape[1] != large.rows.shape[1]
  np.testing.assert_array_equal(small.natural(), large.natural()[:37])
