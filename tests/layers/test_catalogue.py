"""Full softmax in parts: the numbers and gradients of a plain one, on every mesh, without ever holding all scores."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supermoe_jax import config, device_mesh
from supermoe_jax.layers import catalogue
from supermoe_jax.layers.catalogue import Catalogue
from tests.fixtures import grids

ITEMS, D, B, SITES = 300, 4, 8, 3


def arrays() -> tuple[np.ndarray, ...]:
  rng = np.random.default_rng(0)
  state, vectors, bias = (rng.normal(size=s).astype(np.float32) for s in ((B, SITES, D), (ITEMS, D), (ITEMS,)))
  target = rng.integers(2, ITEMS + 2, (B, SITES)).astype(np.int32)
  return state, vectors, bias, target, rng.normal(size=(B, SITES)).astype(np.float32)


def plain(state, vectors, bias, target, weight):
  scores = state @ vectors.T + bias
  own = jnp.take_along_axis(scores, target[..., None] - 2, axis=-1)[..., 0]
  return jnp.sum(weight * (jax.nn.logsumexp(scores, axis=-1) - own))


@functools.cache
def wanted() -> tuple:
  """The loss of the plain form, and its gradients by states, vectors and biases."""
  return jax.jit(jax.value_and_grad(plain, argnums=(0, 1, 2)))(*arrays())


MESHES = [(1, 1, 1), (8, 1, 1), (1, 4, 2), (2, 2, 2)]
CHUNKS = [(8, 1), (96, 1), (1000, 1), (96, 4)]  # and rows a line
QUICK = [((1, 1, 1), 8, 1), ((8, 1, 1), 96, 1), ((1, 4, 2), 1000, 1), ((2, 2, 2), 96, 4), ((2, 2, 2), 96, 1)]


@pytest.mark.parametrize(
  ("sizes", "chunk", "per_line"),
  grids.quick_few(QUICK, [(sizes, *chunk) for sizes in MESHES for chunk in CHUNKS]),
  ids=lambda s: "x".join(map(str, s)) if isinstance(s, tuple) else str(s),
)
def test_the_softmax_in_parts_is_the_plain_one_on_every_mesh(
  sizes: tuple[int, int, int], chunk: int, per_line: int
) -> None:
  state, vectors, bias, target, weight = arrays()
  total, by = wanted()

  def loss(state, rows, bias, target, weight):
    items = Catalogue(rows, bias, ITEMS + 2)
    return jnp.sum(weight * catalogue.cross_entropy(state, target, items, chunk))

  made = Catalogue.of(vectors, bias, 8)
  g, m, _ = made.rows.shape
  lines = np.asarray(made.rows).reshape(g, m // per_line, per_line * D)
  with jax.set_mesh(device_mesh.make_mesh(config.Mesh(*sizes))):
    found, mine = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(
      state, lines, np.asarray(made.bias), target, weight
    )
  np.testing.assert_allclose(found, total, rtol=1e-5)
  np.testing.assert_allclose(mine[0], by[0], atol=1e-5)
  rows, biases = np.asarray(mine[1]).reshape(-1, D), np.asarray(mine[2]).reshape(-1)
  np.testing.assert_allclose(rows[2 : ITEMS + 2], by[1], atol=1e-5)
  np.testing.assert_allclose(biases[2 : ITEMS + 2], by[2], atol=1e-5)
  assert not rows[:2].any() and not rows[ITEMS + 2 :].any()  # no items, and what only fills the stripes


@pytest.mark.parametrize(
  ("sizes", "chunk"),
  grids.quick_few([((1, 1, 1), 8), ((2, 2, 2), 1000)], itertools.product([(1, 1, 1), (2, 2, 2)], [8, 1000])),
  ids=str,
)
def test_any_of_several_targets_is_right(sizes: tuple[int, int, int], chunk: int) -> None:
  """The loss is −log of the sum of the targets' probabilities; 0 is no target, and a code counts once."""
  state, vectors, bias, _, weight = arrays()
  rng = np.random.default_rng(1)
  targets = rng.integers(0, ITEMS + 2, (*state.shape[:-1], 5)) * (rng.random((*state.shape[:-1], 5)) < 0.7)
  targets[..., 4] = targets[..., 0]

  def plain_loss(state, vectors, bias):
    logits = state @ vectors.T + bias
    right = (targets[..., None] == np.arange(2, ITEMS + 2)).any(axis=-2)
    every = jax.nn.logsumexp(logits, axis=-1)
    own = jax.nn.logsumexp(jnp.where(right, logits, -1e30), axis=-1)
    return jnp.sum(weight * (every - jnp.where(right.any(axis=-1), own, 0.0)))

  def loss(state, rows, bias):
    return jnp.sum(weight * catalogue.cross_entropy(state, targets, Catalogue(rows, bias, ITEMS + 2), chunk))

  total, by = jax.value_and_grad(plain_loss, argnums=(0, 1, 2))(state, vectors, bias)
  made = Catalogue.of(vectors, bias, 8)
  with jax.set_mesh(device_mesh.make_mesh(config.Mesh(*sizes))):
    rows = np.asarray(made.rows), np.asarray(made.bias)
    found, mine = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(state, *rows)
  np.testing.assert_allclose(found, total, rtol=1e-5)
  np.testing.assert_allclose(mine[0], by[0], atol=1e-5)
  np.testing.assert_allclose(np.asarray(mine[1]).reshape(-1, D)[2 : ITEMS + 2], by[1], atol=1e-5)
  np.testing.assert_allclose(np.asarray(mine[2]).reshape(-1)[2 : ITEMS + 2], by[2], atol=1e-5)


def test_scores_beyond_floats_are_summed_all_the_same() -> None:
  state, vectors, bias, target, weight = arrays()
  total = jax.jit(plain)(100 * state, vectors, bias, target, weight)
  made = Catalogue.of(vectors, bias)
  found = jax.jit(lambda s, t: catalogue.cross_entropy(s, t, made, 16))(100 * state, target)
  np.testing.assert_allclose(np.sum(weight * found), total, rtol=1e-5)


def test_the_program_never_holds_the_scores_of_all_items() -> None:
  items, chunk = 1 << 16, 256
  state, target = jnp.zeros((64, SITES, D)), jnp.full((64, SITES), 2)

  def loss(state, rows, bias):
    return jnp.sum(catalogue.cross_entropy(state, target, Catalogue(rows, bias, items), chunk))

  made = Catalogue.of(jnp.zeros((items - 2, D)))
  text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(state, made.rows, made.bias).compile().as_text()
  sizes = [np.prod([int(d) for d in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
  assert max(sizes) <= max(items * D, 64 * SITES * chunk)
