"""MMoE, PLE and the recurrent encoder against plain NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax.batch import Features
from supermoe_jax.layers.table import TableRows
from supermoe_jax.models.baselines import PLE, ExpertMlps, GRUEncoder, MMoE
from tests.fixtures.small_model import MODEL, SCHEMA, B, D, S, noise, random_features

E, T, H = 3, 4, 5
gelu = jax.jit(jax.nn.gelu)


@pytest.fixture(scope="module")
def z() -> np.ndarray:
  return np.random.default_rng(0).normal(size=(2, 3, D)).astype(np.float32)


def mlps(module: ExpertMlps, x: np.ndarray) -> np.ndarray:
  """`[B, S, E, D]`, expert by expert."""
  up, up_bias, down, down_bias = (
    np.asarray(p[...]) for p in (module.up, module.up_bias, module.down, module.down_bias)
  )
  hidden = [np.asarray(gelu(x @ up[e] + up_bias[e])) for e in range(len(up))]
  return np.stack([h @ down[e] + down_bias[e] for e, h in enumerate(hidden)], axis=2)


def gate(module, x: np.ndarray, task: int = 0) -> np.ndarray:
  """`[B, S, E, 1]`."""
  weight = np.exp(x @ np.asarray(module.kernel[task]))
  return (weight / weight.sum(axis=-1, keepdims=True))[..., None]


def test_mmoe_equals_its_formula(z: np.ndarray) -> None:
  model = noise(lambda: MMoE(D, H, E, T, rngs=nnx.Rngs(0)))
  views, gates = jax.jit(lambda z: model(z))(z)
  assert views.shape == (2, 3, T, D)
  assert gates.shape == (2, 3, T, E)
  outputs = mlps(model.experts, z)
  for t in range(T):
    np.testing.assert_allclose(gates[:, :, t], gate(model.gates, z, t)[..., 0], atol=1e-5)
    np.testing.assert_allclose(views[:, :, t], np.sum(gate(model.gates, z, t) * outputs, axis=2), atol=1e-4)


@pytest.mark.parametrize("levels", [1, 3])
def test_ple_equals_its_formula(levels: int, z: np.ndarray) -> None:
  model = noise(lambda: PLE(D, H, E, 2, T, levels, rngs=nnx.Rngs(0)))
  shared, own = z, [z] * T
  for i, level in enumerate(model.levels):
    common = mlps(level.shared, shared)
    outputs = [mlps(level.tasks[t], own[t]) for t in range(T)]
    own = [
      np.sum(gate(level.gates[t], own[t]) * np.concatenate([outputs[t], common], axis=2), axis=2) for t in range(T)
    ]
    assert (level.shared_gate is None) == (i + 1 == levels)
    if level.shared_gate is not None:
      shared = np.sum(gate(level.shared_gate, shared) * np.concatenate([*outputs, common], axis=2), axis=2)
  views, gates = jax.jit(lambda z: model(z))(z)
  assert gates is None
  assert views.shape == (2, 3, T, D)
  np.testing.assert_allclose(views, np.stack(own, axis=2), rtol=1e-3, atol=1e-4)


def test_a_ple_without_experts_is_an_error() -> None:
  with pytest.raises(ValueError, match="task_experts=0"):
    PLE(D, H, 1, 0, 2, 2, rngs=nnx.Rngs(0))


def test_all_experts_weigh_alike_at_first(z: np.ndarray) -> None:
  gates = jax.jit(lambda z: MMoE(D, H, E, T, rngs=nnx.Rngs(0))(z)[1])(z)
  np.testing.assert_allclose(gates, 1 / E, rtol=1e-6)


@pytest.fixture(scope="module")
def gru() -> GRUEncoder:
  return noise(lambda: GRUEncoder(MODEL, SCHEMA, rngs=nnx.Rngs(0)))


def one_by_one(gru: GRUEncoder, features: Features) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The states after each event, what is known of each snapshot, and the former normed."""
  states = gru.event_embedding(features.codes, features.source, features.numeric, features.calendar, features.gap)
  for cell in gru.cells:
    _, states = jax.lax.scan(lambda h, x, cell=cell: (cell(h, x)[0],) * 2, jnp.zeros((B, D)), states.swapaxes(0, 1))
    states = states.swapaxes(0, 1)
  query = gru.query_mlp(gru.query_embedding(features.query_calendar, features.query_gap, features.query_aggregates))
  return states, query, gru.norm(states)


def test_a_snapshot_reads_the_state_after_the_last_event_that_it_sees(gru: GRUEncoder) -> None:
  features = random_features()
  features = features._replace(query_events=features.query_events.copy())
  features.query_events[1, 1] = 99  # more than there are means all
  encoded = jax.tree.map(np.asarray, jax.jit(lambda f: gru(f, dropless=True))(features))
  states, query, norm = jax.tree.map(np.asarray, jax.jit(lambda f: one_by_one(gru, f))(features))
  np.testing.assert_allclose(encoded.events, norm, atol=1e-4)
  wanted = {}
  for row in range(B):
    for snapshot in np.flatnonzero(features.query_valid[row]):
      n = min(features.query_events[row, snapshot], features.length[row])
      wanted[row, snapshot] = (states[row, n - 1] if n else np.zeros(D)) + query[row, snapshot]
  normed = jax.jit(gru.norm)(np.stack(list(wanted.values())))
  aggregates = np.stack([features.query_aggregates[place] for place in wanted])
  z = gru.query_embedding.add_aggregates(normed, aggregates)
  np.testing.assert_allclose([encoded.z[place] for place in wanted], z, atol=1e-4)


def test_a_recurrent_encoder_has_no_experts(gru: GRUEncoder) -> None:
  encoded = jax.eval_shape(lambda f: gru(f, dropless=False), random_features())
  assert encoded.views is None
  assert encoded.gates is None
  assert encoded.experts.sums.chosen.shape == (0, MODEL.experts)
  assert encoded.experts.stats.load.shape == (0, MODEL.experts)
  assert encoded.experts.stats.expert.shape == (0, B, S, MODEL.experts_per_token)
  assert {type(v) for _, v in nnx.to_flat_state(nnx.state(gru))} == {nnx.Param, TableRows}


def test_dropout_of_a_recurrent_encoder_follows_the_seed_and_bfloat16_stays_inside() -> None:
  settings = dataclasses.replace(MODEL, dropout=0.5, dtype="bfloat16")
  gru = noise(lambda: GRUEncoder(settings, SCHEMA, rngs=nnx.Rngs(0)))
  encode = jax.jit(lambda f, key: gru(f, dropless=False, rngs=nnx.Rngs(dropout=key)).z)
  one, same, other = (encode(random_features(), jax.random.key(seed)) for seed in (1, 1, 2))
  assert one.dtype == jnp.float32
  np.testing.assert_array_equal(one, same)
  assert not np.array_equal(one, other)
