"""What heads compute, on small arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax.layers.heads import EventLabelHead, LinearHead

D = 4


def test_one_value_in_question_keeps_its_dimension_when_there_could_be_several() -> None:
  z = jnp.ones((2, 3, D))
  assert LinearHead(D, 1, rngs=nnx.Rngs(0))(z).shape == (2, 3, 1)
  assert LinearHead(D, 5, rngs=nnx.Rngs(0))(z).shape == (2, 3, 5)
  assert LinearHead(D, rngs=nnx.Rngs(0))(z).shape == (2, 3)


@pytest.fixture(scope="module")
def states() -> tuple[jax.Array, jax.Array]:
  return tuple(jax.random.normal(jax.random.key(0), (2, 5, 3, D)))


def test_an_event_label_starts_at_nought_and_can_be_learned(states) -> None:
  head = EventLabelHead(D, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(head(*states), np.zeros((5, 3)))
  graph, state = nnx.split(head)
  gradient = jax.grad(lambda s: jnp.sum(jnp.sin(nnx.merge(graph, s)(*states) + 1)))(state)
  assert np.abs(gradient["linear"]["kernel"].get_value()).min() > 0
  assert np.abs(gradient["down"]["kernel"].get_value()).max() > 0


def test_an_event_label_depends_on_the_state_the_event_and_both_together(states) -> None:
  h, g = states
  head = EventLabelHead(D, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  head.linear.kernel[...] = jnp.asarray(rng.normal(size=(3 * D, 1)), jnp.float32)
  linear = head.linear.kernel[:, 0]
  wanted = h @ linear[:D] + g @ linear[D : 2 * D] + (h * g) @ linear[2 * D :]
  np.testing.assert_allclose(head(h, g), wanted, atol=1e-5)
  np.testing.assert_allclose(head(h, jnp.zeros_like(g)), h @ linear[:D], atol=1e-5)
  head.down.kernel[...] = jnp.asarray(rng.normal(size=(D, 1)), jnp.float32)
  hidden = jax.nn.gelu(jnp.concatenate([h, g, h * g], axis=-1) @ head.up.kernel[...])
  np.testing.assert_allclose(head(h, g), wanted + (hidden @ head.down.kernel[...])[..., 0], atol=1e-5)
