import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax import config, device_mesh
from supermoe_jax.evaluation.ranking import target_ranks
from supermoe_jax.layers.catalogue import Catalogue
from tests.fixtures.grids import quick_few

ITEMS, N, D = 37, 6, 4  # of all cases here, so that they share programs
CHUNK = 7  # the last part holds fewer


def slow_rank(scores: np.ndarray, target: int, seen: np.ndarray | tuple = ()) -> float:
  """The rank of a target by its definition: 1, and one for each other item not seen that scores as much or more."""
  if target < 0 or target in seen:
    return np.inf
  allowed = np.ones(len(scores), bool)
  allowed[[target, *seen]] = False
  return 1.0 + np.sum(allowed & (scores >= scores[target]))


def small_numbers(rng: np.random.Generator, *shape: int) -> np.ndarray:
  """Scores are sums of products of whole numbers, so they are exact and often tie."""
  return rng.integers(-2, 3, shape).astype(np.float32)


def ranks(state: np.ndarray, rows: np.ndarray, target: list[int], seen: list[np.ndarray] | None = None) -> list[float]:
  """The ranks of the first questions; more are added to make N of them."""
  asked = np.zeros(N, int)
  asked[: len(target)] = target
  if seen is not None:
    seen = [*seen, *[np.array([], int)] * (N - len(seen) - 1), np.arange(1, 6)]
  return target_ranks(state, asked, seen, Catalogue.of(rows), CHUNK)[: len(target)].tolist()


CASES = list(itertools.product([7, 16, 100], [False, True]))


@pytest.mark.parametrize(("chunk", "exclude"), quick_few([(CHUNK, True), (100, False)], CASES))
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999))
def test_full_ranking_in_chunks_is_that_of_all_scores(chunk: int, exclude: bool, seed: int) -> None:
  rng = np.random.default_rng(seed)
  state, rows, bias = (small_numbers(rng, *s) for s in ((N, D), (ITEMS, D), (ITEMS,)))
  target = rng.integers(-1, ITEMS, N)
  seen = [rng.choice(ITEMS, 5, replace=False) for _ in range(N)] if exclude else None
  rank = target_ranks(state, target, seen, Catalogue.of(rows, bias), chunk)
  scores = state @ rows.T + bias
  assert rank.tolist() == [slow_rank(scores[i], target[i], seen[i] if seen else ()) for i in range(N)]


@pytest.mark.parametrize("chunk", [CHUNK, 100])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999))
def test_the_best_of_several_targets_is_ranked_without_the_others(chunk: int, seed: int) -> None:
  rng = np.random.default_rng(seed)
  state, rows = (small_numbers(rng, *s) for s in ((N, D), (ITEMS, D)))
  target = rng.integers(0, ITEMS, (N, 3)) * (rng.random((N, 3)) < 0.7)
  target[target == 0] = -1
  seen = [rng.choice(ITEMS, 5, replace=False) for _ in range(N)]
  scores = state @ rows.T
  wanted = []
  for i in range(N):
    right = [t for t in target[i] if t >= 0 and t not in seen[i]]
    wanted.append(
      min((slow_rank(scores[i], t, (*seen[i], *(r for r in right if r != t))) for t in right), default=np.inf)
    )
  assert target_ranks(state, target, seen, Catalogue.of(rows), chunk).tolist() == wanted


@pytest.mark.parametrize("sizes", quick_few([((2, 2, 2),)], [((8, 1, 1),), ((2, 2, 2),)]), ids=str)
def test_ranks_on_a_mesh_are_those_of_all_scores(sizes: tuple[int, int, int]) -> None:
  rng = np.random.default_rng(0)
  state, rows, bias = (small_numbers(rng, *s) for s in ((13, D), (1000, D), (1000,)))
  target, seen = rng.integers(-1, 1000, 13), [rng.choice(1000, 6, replace=False) for _ in range(13)]
  scores = state @ rows.T + bias
  wanted = [slow_rank(scores[i], target[i], seen[i]) for i in range(13)]
  assert 1 < np.median(wanted) < 1000
  with jax.set_mesh(device_mesh.make_mesh(config.Mesh(*sizes))):
    assert target_ranks(state, target, seen, Catalogue.of(rows, bias, 8), 128).tolist() == wanted


def test_equal_scores_count_against_the_target() -> None:
  assert ranks(np.ones((N, D), np.float32), np.ones((ITEMS, D), np.float32), [3, 0, ITEMS - 1]) == [ITEMS] * 3


@pytest.mark.parametrize("chunk", [CHUNK, 100])
def test_rows_that_are_equal_score_alike_whether_seen_or_asked_for(chunk: int) -> None:
  """Whether a row was seen, or is the target, must not change the last bits of its score."""
  rng = np.random.default_rng(0)
  state, row = rng.normal(size=(512, 64)).astype(np.float32), rng.normal(size=(1, 64)).astype(np.float32)
  rows, seen = np.repeat(row, ITEMS, axis=0), [rng.choice(ITEMS, 20, replace=False) for _ in range(512)]
  target = np.array([next(i for i in range(ITEMS) if i not in s) for s in seen])
  assert set(target_ranks(state, target, seen, Catalogue.of(rows), chunk)) == {ITEMS - 20}
  twice = [np.concatenate([s, s]) for s in seen]
  assert set(target_ranks(state, target, twice, Catalogue.of(rows), chunk)) == {ITEMS - 20}


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_model_without_finite_scores_ranks_every_target_last(broken: float) -> None:
  state, rows = np.full((N, D), broken, np.float32), np.random.default_rng(0).normal(size=(ITEMS, D)) + 0.0
  rows[:, :2] = [1, -1]  # so that infinite states give scores of inf - inf
  assert set(ranks(state, rows.astype(np.float32), [0, 3, ITEMS - 1])) == {ITEMS}
  one = np.ones((ITEMS, D), np.float32)
  one[5] = np.nan
  assert ranks(np.ones((N, D), np.float32), one, [5, 0]) == [ITEMS, ITEMS]


def test_padding_of_the_last_chunk_is_never_ranked() -> None:
  rows = np.ones((ITEMS, D), np.float32)
  rows[2] = 0.5
  assert ranks(-np.ones((N, D), np.float32), rows, [2]) == [1.0]  # padding has a score of 0, which is higher


def test_any_number_of_seen_items_is_handled() -> None:
  state, rows = np.ones((N, D), np.float32), np.repeat(np.arange(ITEMS, dtype=np.float32)[:, None], D, axis=1)
  seen = [np.array([], int), np.array([0, 1]), np.array([ITEMS - 1]), np.array([ITEMS - 1, ITEMS - 2, 0])]
  assert ranks(state, rows, [ITEMS - 3] * 4, seen) == [3.0, 3.0, 2.0, 1.0]
  assert ranks(state, rows, [ITEMS - 1] * 2, [np.array([], int)] * 2) == [1.0, 1.0]
