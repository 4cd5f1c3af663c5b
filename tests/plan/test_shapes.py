"""The shapes that a plan is made for are those of real data, and without data the largest that a config allows."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset import training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.errors import ConfigError
from supermoe_jax.plan import shapes


def test_a_batch_has_the_shapes_that_are_planned_for(every_task: config.Config, every_task_dataset: Dataset) -> None:
  real = next(iter(training_batches.training_batches(every_task_dataset, every_task)))
  planned = shapes.batch_shapes(every_task, every_task_dataset.schema, every_task_dataset.tie_rate)
  assert jax.tree.structure(real) == jax.tree.structure(planned)
  for wanted, found in zip(jax.tree.leaves(real), jax.tree.leaves(planned), strict=True):
    assert (np.shape(wanted), np.asarray(wanted).dtype) == (found.shape, found.dtype)


def test_without_a_dataset_vocabularies_are_full_and_all_else_is_the_same(
  every_task: config.Config, every_task_dataset: Dataset
) -> None:
  with pytest.raises(ConfigError, match=r"tier: how many classes column 'tier' has.*--config.exclude_tasks=tier"):
    shapes.largest_schema(every_task)
  cfg = dataclasses.replace(every_task, exclude_tasks=("tier",))
  largest, real = shapes.largest_schema(cfg), every_task_dataset.schema
  assert largest.outputs == {n: k for n, k in real.outputs.items() if n in cfg.active_views} | _vocabularies(cfg)
  assert largest.categorical.keys() == real.categorical.keys()
  assert all(largest.categorical[n] >= real.categorical[n] for n in real.categorical)
  page = cfg.data.fields["page"]
  assert largest.categorical["page"] == page.size + 2 + page.buckets
  for part in ("sources", "numeric", "aggregates", "inputs", "numeric_inputs", "extra_columns", "shares"):
    assert getattr(largest, part) == getattr(real, part), part


def _vocabularies(cfg: config.Config) -> dict[str, int]:
  """The outputs of the tasks that rank a vocabulary, if it is full."""
  page = cfg.data.fields["page"]
  return {n: page.size + page.buckets for n, t in cfg.active_views.items() if isinstance(t, config.NextEvent)}


def test_the_aggregates_of_the_quickstart_are_counted_without_its_data(
  cfg: config.Config, dataset: Dataset, log_folder: pathlib.Path
) -> None:
  assert shapes.largest_schema(cfg).aggregates == dataset.schema.aggregates
