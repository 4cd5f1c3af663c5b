"""A user's own counts of values, in the layers that read them."""

import itertools

import jax.numpy as jnp
import numpy as np
from flax import nnx

from supermoe_jax.batch import CALENDAR, ValueCounts
from supermoe_jax.layers.event_embedding import AGGREGATE_KNOTS, COUNTS_SCALE, RAMPS, QueryEmbedding, aggregate_ramps
from supermoe_jax.layers.heads import FutureValuesHead, LinearHead, NextValueHead
from supermoe_jax.layers.table import EmbeddingTable
from tests.fixtures.small_model import noise

A, D, WINDOWS, VALUES = 11, 6, 2, 3
COUNTS = ValueCounts(first=4, windows=WINDOWS, values=VALUES)
COUNTED = range(4, 10)
PLAIN, FACTORS = (0, 1, 3, 10), (2,)


def random_inputs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """States and aggregates of two rows of five snapshots."""
  rng = np.random.default_rng(seed)
  return rng.normal(size=(2, 5, D)).astype(np.float32), rng.normal(size=(2, 5, A)).astype(np.float32)


def raised(aggregates: np.ndarray, *columns: int) -> np.ndarray:
  changed = aggregates.copy()
  changed[..., list(columns)] += 1
  return changed


def test_a_value_is_scored_by_its_own_counts() -> None:
  z, aggregates = random_inputs()
  head = FutureValuesHead(D, 5, COUNTS, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(head.add_aggregates(head(z), aggregates), head(z))  # counts start at nothing
  rng = np.random.default_rng(1)
  shared, own = rng.normal(size=WINDOWS), rng.normal(size=(WINDOWS, VALUES))
  head.shared[...], head.own[...] = shared, own
  got = np.asarray(head.add_aggregates(jnp.zeros((2, 5, 5)), aggregates))
  assert got.shape == (2, 5, 5)
  for value in range(VALUES):
    wanted = sum(aggregates[..., 4 + w * VALUES + value] * (shared[w] + own[w, value]) for w in range(WINDOWS))
    np.testing.assert_allclose(got[..., value], wanted, rtol=1e-4, atol=1e-5)
  assert np.all(got[..., VALUES:] == 0)  # of these nothing is counted


def test_fewer_values_may_be_asked_about_than_are_counted() -> None:
  _, aggregates = random_inputs()
  head, answers = noise(lambda: FutureValuesHead(D, 2, COUNTS, rngs=nnx.Rngs(0))), jnp.zeros((2, 5, 2))
  got = np.asarray(head.add_aggregates(answers, aggregates))
  assert got.shape == (2, 5, 2)
  np.testing.assert_array_equal(
    head.add_aggregates(answers, raised(aggregates, 6, 9)), got
  )  # the third, in both windows
  assert np.all(np.asarray(head.add_aggregates(answers, raised(aggregates, 4)))[..., 0] != got[..., 0])


def test_a_next_value_reads_counts_at_snapshots_alone() -> None:
  z, aggregates = random_inputs()
  states = np.concatenate([z, z[:, :3]], axis=1)  # 3 events, then the 5 snapshots
  head = noise(lambda: NextValueHead(D, EmbeddingTable(9, D, rngs=nnx.Rngs(0)), COUNTS.columns, rngs=nnx.Rngs(0)))
  added = np.asarray(head.state(states, aggregates)) - np.asarray(head.query(states))
  assert np.all(added[:, :3] == 0)
  np.testing.assert_allclose(added[:, 3:], head.own(aggregates[..., COUNTS.columns]), rtol=1e-4, atol=1e-5)


def test_all_aggregates_join_a_representation_and_count_for_nothing_at_first() -> None:
  z, aggregates = random_inputs()
  new = QueryEmbedding(D, CALENDAR, A, PLAIN, FACTORS, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(new.add_aggregates(jnp.asarray(z), aggregates), z)
  embedding = noise(lambda: QueryEmbedding(D, CALENDAR, A, PLAIN, FACTORS, rngs=nnx.Rngs(0)))
  kernel = np.asarray(embedding.into_z.kernel.get_value())
  assert kernel.shape == (A + len(PLAIN) * RAMPS, D)
  for column in range(A):
    moved = embedding.add_aggregates(z, raised(aggregates, column)) - embedding.add_aggregates(z, aggregates)
    if column not in PLAIN:
      wanted = kernel[column] * (COUNTS_SCALE if column in COUNTED else 1)
      np.testing.assert_allclose(moved, np.broadcast_to(wanted, moved.shape), atol=1e-5)
    else:
      ramps = A + RAMPS * PLAIN.index(column)
      steps = ramp(aggregates[..., column] + 1) - ramp(aggregates[..., column])
      np.testing.assert_allclose(moved, kernel[column] + steps @ kernel[ramps : ramps + RAMPS], atol=1e-5)


def ramp(x: np.ndarray) -> np.ndarray:
  """By its definition: for each pair of neighbouring knots, how far x has come from one to the other."""
  return np.stack([np.interp(x, pair, (0, 1)) for pair in itertools.pairwise(AGGREGATE_KNOTS)], axis=-1)


def test_ramps_of_plain_aggregates_are_zero_at_the_mean_and_add_to_every_linear_head() -> None:
  z, aggregates = random_inputs()
  aggregates[0, 0] = 0
  ramps = np.asarray(aggregate_ramps(jnp.asarray(aggregates), PLAIN))
  assert np.all(ramps[0, 0] == 0)
  wanted = np.concatenate([ramp(aggregates[..., i]) - ramp(np.zeros(())) for i in PLAIN], axis=-1)
  np.testing.assert_allclose(ramps, wanted, atol=1e-6)
  for outputs in (None, 3):
    head = LinearHead(D, outputs, PLAIN, rngs=nnx.Rngs(0))
    answers = head(jnp.asarray(z))
    np.testing.assert_array_equal(head.add_aggregates(answers, aggregates), answers)
    head = noise(lambda outputs=outputs: LinearHead(D, outputs, PLAIN, rngs=nnx.Rngs(0)))
    added = np.asarray(head.add_aggregates(answers, aggregates) - answers).reshape(2, 5, -1)
    np.testing.assert_allclose(added, ramps @ np.asarray(head.wide.kernel.get_value()), atol=1e-5)
    assert np.abs(added).max() > 0.1
  plain = LinearHead(D, rngs=nnx.Rngs(0))  # without aggregates
  np.testing.assert_array_equal(plain.add_aggregates(plain(jnp.asarray(z)), aggregates), plain(jnp.asarray(z)))


def test_the_token_of_a_snapshot_reads_all_aggregates_but_counts() -> None:
  embedding = noise(lambda: QueryEmbedding(D, CALENDAR, A, PLAIN, FACTORS, rngs=nnx.Rngs(0)))
  calendar, gap, (_, aggregates) = np.zeros((2, 5, CALENDAR)), np.zeros((2, 5)), random_inputs()
  got = np.asarray(embedding(calendar, gap, aggregates))
  for column in range(A):
    changed = np.asarray(embedding(calendar, gap, raised(aggregates, column)))
    assert np.any(changed != got) == (column not in COUNTED)
