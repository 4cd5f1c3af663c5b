"""Which fields an event's embedding reads."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax.layers.event_embedding import EventEmbedding
from tests.fixtures.small_model import noise

D, CALENDAR = 8, 6
INPUTS, FIELDS = ("item", "device"), {"item": 9, "label": 5, "device": 4}


def make(inputs: tuple[str, ...] = INPUTS, fields: dict[str, int] = FIELDS, **settings) -> EventEmbedding:
  """An embedding of noise, to which the second numeric field is an input."""
  return noise(lambda: EventEmbedding(D, 2, fields, inputs, (1,), CALENDAR, **settings, rngs=nnx.Rngs(0)))


def embedded(module: EventEmbedding) -> Callable[..., np.ndarray]:
  """The compiled module."""
  graph, state = nnx.split(module)
  run = jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs))
  return lambda *inputs: np.asarray(run(state, *inputs))


@functools.cache
def plain() -> tuple[EventEmbedding, Callable[..., np.ndarray]]:
  module = make()
  return module, embedded(module)


def rows(module: EventEmbedding, field: str) -> np.ndarray:
  """The rows of a field's table by code; absent values have none."""
  table = module.table(field)
  whole = np.array(table.rows.get_value()).reshape(-1, D)[: table.size]
  whole[0] = 0.0
  return whole


def arguments() -> tuple[np.ndarray, ...]:
  rng = np.random.default_rng(0)
  codes = np.stack([rng.integers(0, n, (2, 6)) for n in FIELDS.values()], axis=-1).astype(np.int32)
  numeric = rng.normal(size=(2, 6, 2)).astype(np.float32)
  numeric[0, :3] = np.nan
  calendar = rng.normal(size=(2, 6, CALENDAR)).astype(np.float32)
  return codes, np.ones((2, 6), np.int32), numeric, calendar, np.ones((2, 6), np.float32)


def test_fields_that_are_no_inputs_have_no_table_and_are_not_read() -> None:
  embedding, embed = plain()
  assert sorted(embedding.tables) == ["device", "item"]
  codes, source, numeric, *rest = arguments()
  one = embed(codes, source, numeric, *rest)
  codes[..., 1], numeric[..., 0] = 2, np.inf
  np.testing.assert_array_equal(one, embed(codes, source, numeric, *rest))
  assert np.isfinite(one).all()


@pytest.mark.parametrize("column", [0, 2])
def test_every_input_is_read_from_its_own_column(column: int) -> None:
  embedding, embed = plain()
  codes, *rest = arguments()
  changed, own = codes.copy(), rows(embedding, list(FIELDS)[column])
  changed[..., column] = (codes[..., column] + 1) % len(own)
  wanted = own[changed[..., column]] - own[codes[..., column]]
  np.testing.assert_allclose(embed(changed, *rest) - embed(codes, *rest), wanted, atol=1e-5)


def test_a_number_that_is_an_input_is_read() -> None:
  _, embed = plain()
  codes, source, numeric, *rest = arguments()
  one = embed(codes, source, numeric, *rest)
  numeric[..., 1] += 1.0
  two = embed(codes, source, numeric, *rest)
  assert (np.abs(one - two).max(axis=-1) > 1e-4)[1].all()
  np.testing.assert_array_equal(one[0, :3], two[0, :3])  # absent stays absent


def test_source_calendar_and_gap_are_read() -> None:
  embedding, embed = plain()
  codes, source, numeric, calendar, gap = arguments()
  one, kinds = embed(codes, source, numeric, calendar, gap), np.asarray(embedding.source.get_value())
  other = embed(codes, source + 1, numeric, calendar, gap)
  np.testing.assert_allclose(other - one, np.broadcast_to(kinds[2] - kinds[1], one.shape), atol=1e-5)
  other = embed(codes, source, numeric, calendar + 1.0, gap)
  wanted = np.asarray(embedding.calendar.kernel.get_value()).sum(axis=0)
  np.testing.assert_allclose(other - one, np.broadcast_to(wanted, one.shape), atol=1e-5)
  other = embed(codes, source, numeric, calendar, gap + 1.0)
  weight, hours = np.asarray(embedding.gap.kernel.get_value()), [1 / 360, 0.05, 1.0, 24.0, 72.0, 168.0, 336.0, 672.0]
  knots = np.log1p(np.array(hours) * 3600)
  basis = [np.concatenate([[g], np.maximum(g - knots, 0)]) for g in np.log1p([3600.0, 7200.0])]
  np.testing.assert_allclose(other - one, np.broadcast_to((basis[1] - basis[0]) @ weight, one.shape), atol=1e-4)


def test_values_are_the_sum_of_their_rows() -> None:
  embedding, _ = plain()
  codes = np.array([[3, 2], [0, 2], [4, 0]], np.int32)
  wanted = rows(embedding, "item")[codes[:, 0]] + rows(embedding, "device")[codes[:, 1]]  # absent adds nothing
  np.testing.assert_allclose(jax.jit(lambda c: embedding.values(INPUTS, c))(codes), wanted, atol=1e-6)
  np.testing.assert_array_equal(embedding.values((), codes[:, :0]), np.zeros((3, D)))


def test_fields_that_cannot_be_read_are_errors() -> None:
  with pytest.raises(ValueError, match="input 'page' is not a categorical field; there are item, label, device"):
    make(("page",))
  embedding = make(("item",))
  with pytest.raises(ValueError, match="field 'label' is no input"):
    embedding.values(("label",), jnp.zeros((3, 1), int))
  with pytest.raises(ValueError, match=r"codes of shape \(3, 2\) for the 1 fields"):
    embedding.values(("item",), jnp.zeros((3, 2), int))


def test_extra_values_of_a_field_add_their_rows_of_its_table() -> None:
  one, embed = plain()
  many = embedded(make(extra_columns=("item", "label")))
  codes, *rest = arguments()
  further = np.stack([(codes[..., 0] + 3) % 9, codes[..., 1]], axis=-1)
  further[1, 2, 0] = 0  # absent
  difference = many(np.concatenate([codes, further], axis=-1), *rest) - embed(codes, *rest)
  np.testing.assert_allclose(difference, rows(one, "item")[further[..., 0]], atol=1e-5)  # `label` is no input


def test_fields_that_share_a_table_add_rows_of_the_same_table() -> None:
  events = make(("item", "seen"), {"item": 9, "seen": 9, "device": 4}, shares={"seen": "item"})
  assert sorted(events.tables) == ["item"] and events.table("seen") is events.table("item")
  codes, *rest = arguments()
  codes[..., 1] = (codes[..., 0] + 2) % 9
  one, embed = codes.copy(), embedded(events)
  one[..., 1] = 0
  np.testing.assert_allclose(embed(codes, *rest) - embed(one, *rest), rows(events, "item")[codes[..., 1]], atol=1e-5)
  assert {n: a.shape for n, a in events.asked(codes).items()} == {"item": (2, 6, 2)}
