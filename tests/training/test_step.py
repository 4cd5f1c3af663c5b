"""The state and the program of a step; what a step computes on any mesh is in `behaviour/test_step_on_meshes.py`."""

import dataclasses

import jax
import pytest

from supermoe_jax import config, device_mesh
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.training.step import compiled_program, initial_weights


@pytest.mark.parametrize("method", ["equal", "static", "uncertainty", "famo", "seesaw", "pcgrad", "cagrad"])
def test_no_two_parts_of_the_weights_state_share_a_buffer(cfg: config.Config, dataset: Dataset, method: str) -> None:
  """A step is given its state's buffers for good, and can be given each only once."""
  weighing = dataclasses.replace(cfg.train.weighting, method=method)
  state = initial_weights(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, weighting=weighing)))
  leaves = jax.tree.leaves(state)
  assert leaves and len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_runs_that_differ_in_seed_and_numbers_of_the_weighting_share_a_program(
  cfg: config.Config, dataset: Dataset
) -> None:
  mesh = device_mesh.make_mesh(cfg.train.mesh)
  same = config.override(cfg, ["--config.train.seed=5", "--config.tasks.quiet.weight=3.0"])
  assert compiled_program(same, dataset.schema, mesh) is compiled_program(cfg, dataset.schema, mesh)
  other = config.override(cfg, ["--config.train.weighting.method=famo"])
  assert compiled_program(other, dataset.schema, mesh) is not compiled_program(cfg, dataset.schema, mesh)
