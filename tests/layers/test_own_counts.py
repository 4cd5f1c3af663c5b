"""A user's own counts of values, in the layers that read them."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from supermoe_jax.batch import CALENDAR, ValueCounts
from supermoe_jax.layers.event_embedding import QueryEmbedding
from supermoe_jax.layers.heads import FutureValuesHead
from supermoe_jax.layers.own_counts import CountsScore, CountsVector
from tests.fixtures.small_model import noise

A, WINDOWS, VALUES = 11, 2, 3
COUNTS = ValueCounts(first=4, windows=WINDOWS, values=VALUES)


def random_aggregates(seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(2, 5, A)).astype(np.float32)


def test_counts_lie_window_by_window() -> None:
  aggregates = random_aggregates()
  counts = COUNTS.of(aggregates)
  assert counts.shape == (2, 5, WINDOWS, VALUES)
  for window in range(WINDOWS):
    for value in range(VALUES):
      np.testing.assert_array_equal(counts[..., window, value], aggregates[..., 4 + window * VALUES + value])


def test_a_value_is_scored_by_its_own_counts() -> None:
  aggregates = random_aggregates()
  score = CountsScore(COUNTS, outputs=5)
  assert np.all(np.asarray(score(aggregates)) == 0)
  rng = np.random.default_rng(1)
  shared, own = rng.normal(size=WINDOWS), rng.normal(size=(WINDOWS, VALUES))
  score.shared[...], score.own[...] = shared, own
  got = np.asarray(score(aggregates))
  assert got.shape == (2, 5, 5)
  for value in range(VALUES):
    wanted = sum(aggregates[..., 4 + w * VALUES + value] * (shared[w] + own[w, value]) for w in range(WINDOWS))
    np.testing.assert_allclose(got[..., value], wanted, rtol=1e-5, atol=1e-6)
  assert np.all(got[..., VALUES:] == 0)  # of these nothing is counted


def test_fewer_values_may_be_asked_about_than_are_counted() -> None:
  score = noise(lambda: CountsScore(COUNTS, outputs=2))
  aggregates = random_aggregates()
  got = np.asarray(score(aggregates))
  assert got.shape == (2, 5, 2)
  changed = aggregates.copy()
  changed[..., [6, 9]] += 1  # the third value, in both windows
  np.testing.assert_array_equal(score(changed), got)


def test_the_head_of_future_values_adds_what_counts_say() -> None:
  head = noise(lambda: FutureValuesHead(6, 5, COUNTS, rngs=nnx.Rngs(0)))
  z, aggregates = jnp.asarray(np.random.default_rng(2).normal(size=(2, 5, 6)), jnp.float32), random_aggregates()
  np.testing.assert_allclose(head(z, aggregates) - head(z), head.own_counts(aggregates), atol=1e-5)


def test_counts_of_several_fields_join_a_vector_that_starts_at_zero() -> None:
  fields = [ValueCounts(1, 1, 2), COUNTS]
  assert np.all(np.asarray(CountsVector(fields, 7, rngs=nnx.Rngs(0))(random_aggregates())) == 0)
  vector = noise(lambda: CountsVector(fields, 7, rngs=nnx.Rngs(0)))
  aggregates = random_aggregates()
  got = np.asarray(vector(aggregates))
  assert got.shape == (2, 5, 7)
  for column in range(A):
    changed = aggregates.copy()
    changed[..., column] += 1
    assert np.any(np.asarray(vector(changed)) != got) == (column in (1, 2, *range(4, 10)))


def test_the_snapshot_token_reads_the_other_aggregates() -> None:
  embedding = noise(lambda: QueryEmbedding(8, CALENDAR, A, [COUNTS], rngs=nnx.Rngs(0)))
  calendar, gap, aggregates = np.zeros((2, 5, CALENDAR)), np.zeros((2, 5)), random_aggregates()
  got = np.asarray(embedding(calendar, gap, aggregates))
  for column in range(A):
    changed = aggregates.copy()
    changed[..., column] += 1
    assert np.any(np.asarray(embedding(calendar, gap, changed)) != got) == (column not in range(4, 10))
