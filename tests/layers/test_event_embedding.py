"""Which fields an event's embedding reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax.layers.event_embedding import EventEmbedding

D, CALENDAR = 8, 6


def make(inputs: tuple[str, ...], numeric_inputs: tuple[int, ...]) -> EventEmbedding:
  return EventEmbedding(D, 2, {"item": 9, "label": 5, "device": 4}, inputs, numeric_inputs, CALENDAR, rngs=nnx.Rngs(0))


def arguments() -> tuple[jax.Array, ...]:
  rng = np.random.default_rng(0)
  codes = np.stack([rng.integers(0, n, (2, 6)) for n in (9, 5, 4)], axis=-1)
  numeric = rng.normal(size=(2, 6, 2)).astype(np.float32)
  numeric[0, :3] = np.nan
  calendar = rng.normal(size=(2, 6, CALENDAR)).astype(np.float32)
  return jnp.asarray(codes), jnp.ones((2, 6), int), jnp.asarray(numeric), jnp.asarray(calendar), jnp.ones((2, 6))


def test_fields_that_are_no_inputs_have_no_table_and_are_not_read() -> None:
  embedding = make(("item", "device"), (1,))
  assert sorted(embedding.tables) == ["device", "item"]
  codes, source, numeric, *rest = arguments()
  one = embedding(codes, source, numeric, *rest)
  two = embedding(codes.at[..., 1].set(2), source, numeric.at[..., 0].set(jnp.inf), *rest)
  np.testing.assert_array_equal(one, two)
  assert np.isfinite(one).all()


@pytest.mark.parametrize("column", [0, 2])
def test_every_input_is_read_from_its_own_column(column: int) -> None:
  embedding = make(("item", "device"), (1,))
  codes, *rest = arguments()
  name = ("item", "label", "device")[column]
  changed = codes.at[..., column].set(2 + (codes[..., column] + 1) % 2)
  difference = embedding(changed, *rest) - embedding(codes, *rest)
  wanted = embedding.tables[name](changed[..., column]) - embedding.tables[name](codes[..., column])
  np.testing.assert_allclose(difference, wanted, atol=1e-5)


def test_a_number_that_is_an_input_is_read() -> None:
  embedding = make(("item",), (1,))
  codes, source, numeric, *rest = arguments()
  one, two = (embedding(codes, source, n, *rest) for n in (numeric, numeric.at[..., 1].add(1.0)))
  assert (np.abs(one - two).max(axis=-1) > 1e-4)[1].all()
  np.testing.assert_array_equal(one[0, :3], two[0, :3])  # absent stays absent


def test_values_are_the_sum_of_their_rows() -> None:
  embedding = make(("item", "device"), ())
  codes = jnp.array([[3, 2], [0, 2], [4, 0]])
  rows = embedding.tables["item"].natural(), embedding.tables["device"].natural()
  wanted = np.stack([rows[0][3] + rows[1][2], rows[1][2], rows[0][4]])  # absent adds nothing
  np.testing.assert_allclose(embedding.values(("item", "device"), codes), wanted, atol=1e-6)
  np.testing.assert_array_equal(embedding.values((), codes[:, :0]), np.zeros((3, D)))


def test_fields_that_cannot_be_read_are_errors() -> None:
  with pytest.raises(ValueError, match="input 'page' is not a categorical field; there are item, label, device"):
    make(("page",), ())
  embedding = make(("item",), ())
  with pytest.raises(ValueError, match="field 'label' is no input"):
    embedding.values(("label",), jnp.zeros((3, 1), int))
  with pytest.raises(ValueError, match=r"codes of shape \(3, 2\) for the 1 fields"):
    embedding.values(("item",), jnp.zeros((3, 2), int))


def test_further_values_of_a_field_add_their_rows_of_its_table() -> None:
  inputs = ("item", "device")
  fields = {"item": 9, "label": 5, "device": 4}
  one = EventEmbedding(D, 2, fields, inputs, (1,), CALENDAR, rngs=nnx.Rngs(0))
  many = EventEmbedding(D, 2, fields, inputs, (1,), CALENDAR, further=("item", "label"), rngs=nnx.Rngs(0))
  codes, *rest = arguments()
  further = jnp.stack([(codes[..., 0] + 3) % 9, codes[..., 1]], axis=-1).at[1, 2, 0].set(0)  # absent
  difference = many(jnp.concatenate([codes, further], axis=-1), *rest) - one(codes, *rest)
  wanted = jnp.where((further[..., 0] > 0)[..., None], one.tables["item"].natural()[further[..., 0]], 0.0)
  np.testing.assert_allclose(difference, wanted, atol=1e-5)  # `label` is no input


def test_fields_that_share_a_table_add_rows_of_the_same_table() -> None:
  fields = {"item": 9, "seen": 9, "device": 4}
  events = EventEmbedding(D, 2, fields, ("item", "seen"), (1,), CALENDAR, shares={"seen": "item"}, rngs=nnx.Rngs(0))
  assert sorted(events.tables) == ["item"] and events.table("seen") is events.table("item")
  codes, *rest = arguments()
  codes = codes.at[..., 1].set((codes[..., 0] + 2) % 9)
  one = codes.at[..., 1].set(0)
  difference = events(codes, *rest) - events(one, *rest)
  np.testing.assert_allclose(difference, events.table("item")(codes[..., 1]), atol=1e-5)
  assert {n: a.shape for n, a in events.asked(codes).items()} == {"item": (2, 6, 2)}
