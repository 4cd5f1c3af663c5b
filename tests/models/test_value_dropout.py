"""Dropout of events' values: which values it hides, how often, and that it is for training alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax.layers.table import ONE_DEVICE
from supermoe_jax.models.encoder import embed_rows, make_embeddings, shown_aggregates
from tests.fixtures.small_model import MODEL, SCHEMA, B, S, random_features


def _events(rate: float, seed: int | None) -> np.ndarray:
  embeddings = make_embeddings(MODEL, SCHEMA, ONE_DEVICE, nnx.Rngs(0))
  rngs = None if seed is None else nnx.Rngs(dropout=seed)
  return np.asarray(embed_rows(*embeddings, random_features(), rate, rngs)[0])


def test_values_are_hidden_in_training_alone() -> None:
  whole = _events(0.0, 1)
  np.testing.assert_array_equal(_events(0.5, None), whole)
  np.testing.assert_array_equal(_events(0.0, None), whole)
  assert not np.array_equal(_events(0.5, 1), whole)
  np.testing.assert_array_equal(_events(0.5, 1), _events(0.5, 1))
  assert not np.array_equal(_events(0.5, 1), _events(0.5, 2))


@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_a_hidden_value_is_an_absent_one_and_as_many_are_hidden_as_asked(rate: float) -> None:
  """With tables of ones and everything else 0, an event's embedding counts the values that it shows."""
  events, queries = make_embeddings(MODEL, SCHEMA, ONE_DEVICE, nnx.Rngs(0))
  nnx.update(events, jax.tree.map(jnp.zeros_like, nnx.state(events)))
  for table in events.tables.values():
    table.rows[...] = jnp.ones_like(table.rows.get_value())
  features = random_features()
  full = np.asarray(embed_rows(events, queries, features)[0])[..., 0]
  shown = np.stack(
    [np.asarray(embed_rows(events, queries, features, rate, nnx.Rngs(dropout=s))[0])[..., 0] for s in range(60)]
  )
  assert (shown <= full).all() and (shown == shown.astype(int)).all()
  assert shown.sum() / (60 * full.sum()) == pytest.approx(1 - rate, abs=0.03)


def test_heads_miss_the_counts_of_half_of_the_snapshots_in_training_alone() -> None:
  features = [random_features(seed)._replace(query_time=random_times(seed)) for seed in range(40)]
  shown = np.stack([np.asarray(shown_aggregates(f, training=True)) for f in features])
  whole = np.stack([f.query_aggregates for f in features])
  there = (shown != 0).any(axis=-1)
  np.testing.assert_array_equal(shown, np.where(there[..., None], whole, 0))
  assert there.mean() == pytest.approx(0.5, abs=0.05)
  np.testing.assert_array_equal(shown_aggregates(features[0], training=False), whole[0])
  np.testing.assert_array_equal(shown_aggregates(features[0], training=True), shown[0])  # it depends on nothing else


def random_times(seed: int) -> np.ndarray:
  return np.random.default_rng(seed).uniform(0, 1e4, (B, S)).astype(np.float32)
