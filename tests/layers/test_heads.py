"""What heads compute, on small arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax.layers.heads import EventLabelHead, LinearHead
from tests.fixtures.small_model import noise

D = 4


def test_one_value_in_question_keeps_its_dimension_when_there_could_be_several() -> None:
  z = jnp.ones((2, 3, D))
  for outputs, shape in ((1, (2, 3, 1)), (5, (2, 3, 5)), (None, (2, 3))):
    assert jax.eval_shape(lambda z, n=outputs: LinearHead(D, n, rngs=nnx.Rngs(0))(z), z).shape == shape


@pytest.fixture(scope="module")
def states() -> tuple[np.ndarray, np.ndarray]:
  return tuple(np.random.default_rng(0).normal(size=(2, 5, 3, D)).astype(np.float32))


def test_an_event_label_starts_at_nought_and_can_be_learned(states) -> None:
  graph, state = nnx.split(EventLabelHead(D, rngs=nnx.Rngs(0)))

  @jax.jit
  def run(state: nnx.State):
    def loss(state: nnx.State) -> tuple[jax.Array, jax.Array]:
      answers = nnx.merge(graph, state)(*states)
      return jnp.sum(jnp.sin(answers + 1)), answers

    return jax.grad(loss, has_aux=True)(state)

  gradient, answers = run(state)
  np.testing.assert_array_equal(answers, np.zeros((5, 3)))
  assert np.abs(gradient["linear"]["kernel"].get_value()).min() > 0
  assert np.abs(gradient["down"]["kernel"].get_value()).max() > 0


def test_an_event_label_depends_on_the_state_the_event_and_both_together(states) -> None:
  h, g = states
  graph, state = nnx.split(noise(lambda: EventLabelHead(D, rngs=nnx.Rngs(0))))
  run = jax.jit(lambda state, h, g: nnx.merge(graph, state)(h, g))
  weights = {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(state)}
  linear = weights["linear", "kernel"][:, 0]
  wanted = h @ linear[:D] + g @ linear[D : 2 * D] + (h * g) @ linear[2 * D :] + weights["linear", "bias"]
  hidden = np.concatenate([h, g, h * g], axis=-1) @ weights["up", "kernel"] + weights["up", "bias"]
  wanted += (np.asarray(jax.nn.gelu(hidden)) @ weights["down", "kernel"])[..., 0]
  np.testing.assert_allclose(run(state, h, g), wanted, atol=1e-5)
  state["down"]["kernel"].set_value(np.zeros((D, 1), np.float32))
  np.testing.assert_allclose(run(state, h, 0 * g), h @ linear[:D] + weights["linear", "bias"], atol=1e-5)
