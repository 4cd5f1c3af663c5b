"""Counts beside the dot products: loss, gradients, ranks and single codes agree with dense counts, on every mesh."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supermoe_jax import config, device_mesh
from supermoe_jax.evaluation.ranking import target_ranks
from supermoe_jax.layers import catalogue
from supermoe_jax.layers.catalogue import Catalogue
from supermoe_jax.layers.memory.remembered import Remembered
from tests.fixtures import grids

ITEMS, D, B, SITES, L, C = 300, 4, 8, 3, 5, 6
SIZE = ITEMS + 2


def counts(seed: int, sites: int = SITES, rows: int = B) -> Remembered:
  """Counts of codes that repeat within an event, across events, and with negative numbers; 0 stands for none."""
  rng = np.random.default_rng(seed)
  code = rng.integers(0, SIZE, (rows, L, C)).astype(np.int32) * (rng.random((rows, L, C)) < 0.8)
  code[:, 1, :3], code[:, 2, 0] = code[:, 0, :3], code[:, 2, 1]
  number = rng.normal(0.5, 1.0, (rows, L, C)).astype(np.float32)
  return Remembered(rng.random((rows, sites, L)).astype(np.float32), code.astype(np.int32), number)


def dense(remembered: Remembered) -> np.ndarray:
  """log(1 + count) of every item, `[B, S, ITEMS]`, one number at a time."""
  total = np.zeros((*remembered.weight.shape[:2], SIZE))
  for b, s, event, c in np.ndindex(*total.shape[:2], *remembered.code.shape[1:]):
    total[b, s, remembered.code[b, event, c]] += remembered.weight[b, s, event] * remembered.number[b, event, c]
  return np.log1p(np.maximum(total, 0))[..., 2:]


def states(seed: int, *shape: int) -> tuple[np.ndarray, ...]:
  """States with two gains, vectors and biases."""
  rng = np.random.default_rng(seed)
  return tuple(rng.normal(size=s).astype(np.float32) for s in ((*shape, D + 2), (ITEMS, D), (ITEMS,)))


@pytest.mark.parametrize(
  ("sizes", "chunk"),
  grids.quick_few(
    [((1, 1, 1), 40), ((1, 4, 2), 1000), ((2, 2, 2), 96)],
    itertools.product([(1, 1, 1), (8, 1, 1), (1, 4, 2), (2, 2, 2)], [40, 96, 1000]),
  ),
  ids=str,
)
def test_the_softmax_with_counts_is_the_dense_one_on_every_mesh(sizes: tuple[int, int, int], chunk: int) -> None:
  state, vectors, bias = states(0, B, SITES)
  rng = np.random.default_rng(1)
  target = (rng.integers(2, SIZE, (B, SITES, 2)) * (rng.random((B, SITES, 2)) < 0.7)).astype(np.int32)
  weight = rng.normal(size=(B, SITES)).astype(np.float32)
  remembered = counts(2), counts(3)
  logs = [dense(r) for r in remembered]

  def plain(state, vectors, bias):
    logits = state[..., :D] @ vectors.T + bias + sum(state[..., D + k, None] * log for k, log in enumerate(logs))
    right = (target[..., None] == np.arange(2, SIZE)).any(axis=-2)
    own = jax.nn.logsumexp(jnp.where(right, logits, -1e30), axis=-1)
    return jnp.sum(weight * (jax.nn.logsumexp(logits, axis=-1) - jnp.where(right.any(axis=-1), own, 0.0)))

  def loss(state, rows, bias, remembered):
    found = catalogue.cross_entropy(state, target, Catalogue(rows, bias, SIZE), chunk, remembered)
    return jnp.sum(weight * found)

  total, by = jax.jit(jax.value_and_grad(plain, argnums=(0, 1, 2)))(state, vectors, bias)
  made = Catalogue.of(vectors, bias, 8)
  with jax.set_mesh(device_mesh.make_mesh(config.Mesh(*sizes))):
    rows = np.asarray(made.rows), np.asarray(made.bias)
    found, mine = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(state, *rows, remembered)
  np.testing.assert_allclose(found, total, rtol=1e-5)
  np.testing.assert_allclose(mine[0], by[0], atol=1e-5)
  np.testing.assert_allclose(np.asarray(mine[1]).reshape(-1, D)[2:SIZE], by[1], atol=1e-5)
  np.testing.assert_allclose(np.asarray(mine[2]).reshape(-1)[2:SIZE], by[2], atol=1e-5)


@pytest.mark.parametrize(("sizes", "chunk"), [((1, 1, 1), 96), ((2, 2, 2), 1000)], ids=str)
def test_ranks_with_counts_are_the_dense_ones(sizes: tuple[int, int, int], chunk: int) -> None:
  n = 13
  state, vectors, bias = states(4, n)
  remembered = counts(5, 1, n), counts(6, 1, n)
  score = (
    state[:, :D] @ vectors.T + bias + sum(state[:, D + k, None] * dense(r)[:, 0] for k, r in enumerate(remembered))
  )
  target = np.random.default_rng(7).integers(0, ITEMS, n)
  target[::2] = score.argmax(axis=1)[::2] if n else 0
  seen = [np.array([int(t + 1) % ITEMS, int(t + 7) % ITEMS]) for t in target]
  wanted = []
  for own, t, hidden in zip(score, target, seen):
    own = np.delete(own, hidden), own[t]
    wanted.append(int(np.sum(own[0] > own[1])) + 1)
  assert wanted.count(1) >= n // 2 and max(wanted) > 10
  with jax.set_mesh(device_mesh.make_mesh(config.Mesh(*sizes))):
    found = target_ranks(state, target, seen, Catalogue.of(vectors, bias, 8), chunk, remembered)
  assert found.tolist() == wanted


def test_single_codes_have_the_dense_counts() -> None:
  remembered = counts(8)
  logs = dense(remembered)
  rng = np.random.default_rng(9)
  shared = np.append(rng.integers(2, SIZE, 40), [7, 7, remembered.code[0, 0, 0]])
  wanted = np.where(shared > 1, logs[..., np.maximum(shared - 2, 0)], 0)
  found = np.asarray(jax.jit(Remembered.logs_of)(remembered, shared))
  there = shared > 1  # code 0 is no value, and code 1 no item
  np.testing.assert_allclose(found[..., there], wanted[..., there], atol=1e-5)
  assert np.count_nonzero(found) > 20
  own = rng.integers(2, SIZE, (B, SITES, 4))
  own[:, :, 0], own[:, :, 1] = remembered.code[:, :1, 0].clip(2), remembered.code[:, 2:3, 4].clip(2)
  found = np.asarray(jax.jit(Remembered.logs_at)(remembered, own))
  np.testing.assert_allclose(found, np.take_along_axis(logs, own - 2, axis=2), atol=1e-5)
  assert np.count_nonzero(found) > 5
  assert not np.asarray(remembered.logs_at(np.zeros((B, SITES, 1), np.int32))).any()


def test_the_counts_of_one_site_keep_the_events_of_the_largest_weight() -> None:
  remembered = counts(10, 1)
  np.testing.assert_allclose(
    dense(Remembered(*map(np.asarray, remembered.of_one_site(L)))), dense(remembered), atol=1e-6
  )
  two = Remembered(*map(np.asarray, remembered.of_one_site(2)))
  assert two.code.shape == two.number.shape == (B, 1, 2 * C)
  kept = np.sort(remembered.weight, axis=2)[:, :, -2:-1]
  largest = remembered._replace(weight=np.where(remembered.weight >= kept, remembered.weight, 0))
  np.testing.assert_allclose(dense(two), dense(largest), atol=1e-6)


def test_some_sites_have_the_counts_of_these_sites() -> None:
  remembered = counts(11)
  np.testing.assert_array_equal(dense(remembered.at(slice(1, None))), dense(remembered)[:, 1:])
