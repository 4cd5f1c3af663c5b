import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax import config, sharding
from supermoe_jax.evaluation.ranking import target_ranks
from supermoe_jax.layers.catalogue import Catalogue


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9999), st.booleans(), st.sampled_from([7, 16, 100]))
def test_full_ranking_in_chunks_equals_sorting_all_scores(seed: int, exclude: bool, chunk: int) -> None:
  rng = np.random.default_rng(seed)
  items, n = 37, 6
  state, rows, bias = (rng.normal(size=s).astype(np.float32) for s in ((n, 4), (items, 4), (items,)))
  target = rng.integers(-1, items, n)
  seen = [rng.choice(items, 5, replace=False) for _ in range(n)] if exclude else None
  rank = target_ranks(state, target, seen, Catalogue.of(rows, bias), chunk)
  scores = state @ rows.T + bias
  for i in range(n):
    if target[i] < 0 or (seen is not None and target[i] in seen[i]):
      assert rank[i] == np.inf
      continue
    allowed = np.ones(items, bool)
    if seen is not None:
      allowed[seen[i]] = False
    assert rank[i] == 1 + np.sum((scores[i] > scores[i, target[i]]) & allowed)


def test_ranks_on_a_mesh_are_those_on_one_device() -> None:
  rng = np.random.default_rng(0)
  state, rows, bias = (rng.normal(size=s).astype(np.float32) for s in ((13, 4), (1000, 4), (1000,)))
  target, seen = rng.integers(-1, 1000, 13), [rng.choice(1000, 6, replace=False) for _ in range(13)]
  wanted = target_ranks(state, target, seen, Catalogue.of(rows, bias), 128)
  assert 1 < np.median(wanted) < 1000
  for sizes in ((8, 1, 1), (2, 2, 2)):
    with jax.set_mesh(sharding.make_mesh(config.Mesh(*sizes))):
      np.testing.assert_array_equal(target_ranks(state, target, seen, Catalogue.of(rows, bias, 8), 128), wanted)


def test_equal_scores_count_against_the_target() -> None:
  rank = target_ranks(np.ones((1, 2), np.float32), np.array([3]), None, Catalogue.of(np.ones((9, 2), np.float32)), 4)
  assert rank.tolist() == [9.0]


def test_padding_of_the_last_chunk_is_never_ranked() -> None:
  state, rows = -np.ones((1, 2), np.float32), np.ones((5, 2), np.float32)
  rows[2] = 0.5
  assert target_ranks(state, np.array([2]), None, Catalogue.of(rows), 4).tolist() == [1.0]


@pytest.mark.parametrize("seen", [[np.array([], int)], [np.array([0, 1])]])
def test_any_number_of_seen_items_is_handled(seen: list[np.ndarray]) -> None:
  rows = np.arange(6, dtype=np.float32)[:, None]
  rank = target_ranks(np.ones((1, 1), np.float32), np.array([5]), seen, Catalogue.of(rows), 8)
  assert rank.tolist() == [1.0]
