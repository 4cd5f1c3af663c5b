"""Steps of a table: on every mesh the rows of plain NumPy over the whole table, at the cost of what was asked for."""

import collections
import itertools
import math
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax import config, device_mesh, sharding
from supermoe_jax.layers.exchange import Touched
from supermoe_jax.training import row_optimizers, table_step
from tests.fixtures import table_steps, two_processes
from tests.fixtures.grids import quick_few
from tests.fixtures.table_steps import OPTIMIZERS, SIZE, STEPS, WIDTH

MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2), (3, 1, 1)]


@pytest.fixture(autouse=True, scope="module")
def few_rows_at_once() -> Iterator[None]:
  """A CPU moves these tables' rows in parts, with a smaller one at the end, as it does thousands."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(table_step, "_MOVED_AT_ONCE", 10)
    yield


def named(value: object) -> str:
  """How a mesh or an optimizer stands in a test's name."""
  return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


# Every optimizer and every mesh; `test_any_ids_give_the_rows_of_a_dense_reference` holds two more pairs.
FEW = [
  ("adam", (2, 2, 2)),
  ("adagrad with a prior", (2, 2, 2)),
  ("adagrad", (8, 1, 1)),
  ("adam", (1, 4, 2)),
  ("sgd", (3, 1, 1)),
  ("adam", (1, 1, 1)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), quick_few(FEW, itertools.product(OPTIMIZERS, MESHES)), ids=named)
def test_fifty_steps_on_every_mesh_are_those_of_a_dense_reference(name: str, sizes: tuple[int, int, int]) -> None:
  mesh = device_mesh.make_mesh(config.Mesh(*sizes))
  made = table_steps.batches(0, STEPS, SIZE, rows=24 if 3 in sizes else 8)
  wanted, counts = table_steps.reference(SIZE, OPTIMIZERS[name], made)
  rows, seen = table_steps.run(mesh, SIZE, OPTIMIZERS[name], made)
  np.testing.assert_allclose(rows, wanted, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(seen[:, 0], counts[:, 0], rtol=1e-5)  # norms of gradients
  np.testing.assert_array_equal(seen[:, 1], counts[:, 1])  # codes out of range
  assert not seen[:, 2].any()  # nothing was lost on the way


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "sizes"),
  quick_few([("adam", (1, 1, 1)), ("adagrad", (2, 2, 2))], itertools.product(OPTIMIZERS, [(1, 1, 1), (2, 2, 2)])),
  ids=named,
)
def test_rows_that_share_lines_move_as_those_that_do_not(name: str, sizes: tuple[int, int, int]) -> None:
  """As they lie on TPUs: 32 rows of four numbers side by side."""
  mesh, size = device_mesh.make_mesh(config.Mesh(*sizes)), 1000
  made = table_steps.batches(0, 10, size)
  assert table_steps.created(size, mesh, platform="tpu").rows.shape[-1] == 128
  wanted, plain = table_steps.run(mesh, size, OPTIMIZERS[name], made)
  rows, seen = table_steps.run(mesh, size, OPTIMIZERS[name], made, platform="tpu")
  np.testing.assert_allclose(rows, wanted, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(seen, plain, rtol=1e-5)


@pytest.mark.nightly
@pytest.mark.slow
def test_two_processes_train_the_same_rows() -> None:
  outputs = two_processes.run("table_of_two_processes")
  assert all("2 comparisons equal" in out for out in outputs), "\n".join(outputs)


CODES = {
  "any": st.integers(-2, SIZE + 2),
  "one row": st.just(7),
  "one owner": st.integers(0, 4).map(lambda k: 8 * k + 2),
  "absent": st.just(0),
  "out of range": st.sampled_from([-1, SIZE, SIZE + 1, 2**31 - 1, -(2**31)]),
}


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from(sorted(CODES)), st.sampled_from([(1, 1, 1), (2, 2, 2)]))
def test_any_ids_give_the_rows_of_a_dense_reference(data: st.DataObject, kind: str, sizes: tuple) -> None:
  flat = data.draw(st.lists(CODES[kind], min_size=48, max_size=48))
  codes = np.array(flat, np.int64).astype(np.int32).reshape(8, 6)
  rng = np.random.default_rng(0)
  made = [(codes, rng.normal(size=(8, 6, WIDTH)).astype(np.float32)) for _ in range(2)]
  wanted, counts = table_steps.reference(SIZE, OPTIMIZERS["adagrad"], made)
  rows, seen = table_steps.run(device_mesh.make_mesh(config.Mesh(*sizes)), SIZE, OPTIMIZERS["adagrad"], made)
  np.testing.assert_allclose(rows, wanted, atol=1e-6)
  np.testing.assert_array_equal(seen[:, 1], counts[:, 1])


def test_gradients_that_find_no_cell_are_counted_and_their_rows_stay() -> None:
  """All devices ask one owner for different rows, and there is room for an even share only."""
  mesh = device_mesh.make_mesh(config.Mesh(8))
  codes = (8 * np.arange(8 * 40) + 8).astype(np.int32).reshape(8, 40)  # stripes of 8: all of them are owned by device 0
  size = int(codes.max()) + 1
  made = [(codes, np.ones((8, 40, WIDTH), np.float32))]
  before, _ = table_steps.run(mesh, size, OPTIMIZERS["sgd"], [], stripes=8)
  rows, seen = table_steps.run(mesh, size, OPTIMIZERS["sgd"], made, cells=1.0, stripes=8)
  moved = np.any(rows != before, axis=1)
  cells = math.ceil(5 + 6 * math.sqrt(5))
  assert seen[0, 2] == 8 * (40 - cells)
  assert moved.sum() == 8 * cells and not np.any(moved & ~np.isin(np.arange(size), codes))
  wanted, _ = table_steps.reference(size, OPTIMIZERS["sgd"], made)
  np.testing.assert_allclose(rows[moved], wanted[moved], atol=1e-6)


def test_a_batch_without_any_id_moves_nothing() -> None:
  for sizes in ((1, 1, 1), (2, 2, 2)):
    mesh = device_mesh.make_mesh(config.Mesh(*sizes))
    before, _ = table_steps.run(mesh, SIZE, OPTIMIZERS["adam"], [])
    empty = [(np.zeros((8, 6), np.int32), np.ones((8, 6, WIDTH), np.float32))] * 2
    rows, seen = table_steps.run(mesh, SIZE, OPTIMIZERS["adam"], empty)
    np.testing.assert_array_equal(rows, before)
    assert not seen.any()
    none = [(np.zeros((8, 0), np.int32), np.ones((8, 0, WIDTH), np.float32))]
    np.testing.assert_array_equal(table_steps.run(mesh, SIZE, OPTIMIZERS["adam"], none)[0], before)


SHAPE = re.compile(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]*)\]")
COLLECTIVE = re.compile(r"=.*?\b(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def compiled(size: int, n: int) -> tuple[str, int]:
  """The text of a step's program on 8 devices, for n ids a device, and what it needs beyond its arguments, in bytes."""
  mesh = device_mesh.make_mesh(config.Mesh(2, 2, 2))
  optimizer = OPTIMIZERS["adagrad"]
  with jax.set_mesh(mesh):
    rows = table_steps.shapes(size, mesh)
    layout, where = jax.sharding.NamedSharding(mesh, sharding.spec(None, "rows")), sharding.batch_sharding(mesh)
    on = lambda shapes, lies: jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=lies), shapes)  # noqa: E731
    rows, slots = on((rows, jax.eval_shape(optimizer.initial_state, rows)), layout)
    codes, targets = on((np.zeros((8, n), np.int32), np.zeros((8, n, WIDTH), np.float32)), where)
    step = table_steps.stepper(mesh, size, optimizer, 2.0)
    program = step.lower(rows, slots, codes, targets, 0).compile()
  return program.as_text(), program.memory_analysis().temp_size_in_bytes


def sizes_of(line: str) -> list[int]:
  return [math.prod(int(d) for d in dims.split(",")) if dims else 1 for dims in SHAPE.findall(line)]


def exchanged(text: str) -> collections.Counter[str]:
  """Numbers that collectives carry, by kind."""
  found: collections.Counter[str] = collections.Counter()
  for line in text.splitlines():
    if kind := COLLECTIVE.search(line):
      found[kind[1]] += max(sizes_of(line.split("=", 1)[1].split(kind[1])[0]))
  return found


@pytest.mark.slow
def test_a_step_on_eight_devices_holds_no_table_and_exchanges_only_what_it_asks_for() -> None:
  size, n = 1 << 17, 32
  text, temporary = compiled(size, n)
  whole = size * WIDTH
  assert max(s for line in text.splitlines() for s in sizes_of(line)) == whole // 8  # a device's own part, in place
  assert temporary < whole * 4 // 8 / 4
  found = exchanged(text)
  assert found["all-to-all"] > n * WIDTH
  # Sums of counts and norms over the devices; and devices that share rows of the batch share what they fetched.
  assert found["all-reduce"] <= 16 and not found["reduce-scatter"]
  assert found["all-gather"] <= 2 * n * WIDTH * 2
  larger, _ = compiled(8 * size, n)
  assert exchanged(larger) == found  # whatever the size of the table
  twice, _ = compiled(size, 4 * n)
  assert 2 < exchanged(twice)["all-to-all"] / found["all-to-all"] < 4.2  # as the ids, with less room for chance


def test_bfloat16_rows_keep_what_they_learn_in_the_mean_by_stochastic_rounding() -> None:
  row, code, key = jnp.full((4000, 2), 1.001), jnp.arange(4000), jax.random.key(0)
  out = np.asarray(row_optimizers.round_stochastically(row, jnp.bfloat16, code, key), np.float64)
  assert set(np.unique(out)) == {1.0, 1.0078125}
  assert out.mean() == pytest.approx(1.001, abs=1e-4)
  again = row_optimizers.round_stochastically(row[::-1], jnp.bfloat16, code[::-1], key)
  np.testing.assert_array_equal(np.asarray(again, np.float64)[::-1], out)  # by the row's code, wherever it lies
  odd = jnp.array([[jnp.inf, -jnp.inf, jnp.nan, 0.0, -2.5]])
  np.testing.assert_array_equal(
    np.asarray(row_optimizers.round_stochastically(odd, jnp.bfloat16, code[:1], key), np.float32), odd
  )


def test_bfloat16_rows_on_eight_devices_are_those_on_one() -> None:
  made = table_steps.batches(0, 5, SIZE)
  results = [
    table_steps.run(
      device_mesh.make_mesh(config.Mesh(*sizes)), SIZE, OPTIMIZERS["adagrad"], made, 8.0, "bfloat16", True
    )[0]
    for sizes in ((1, 1, 1), (2, 2, 2))
  ]
  # Sums in another order may round once the other way.
  assert np.mean(results[0] != results[1]) < 0.01
  np.testing.assert_allclose(*results, rtol=0.02, atol=0.02)


def test_rows_of_padding_do_not_change_how_far_others_move() -> None:
  """How many there are depends on the mesh."""
  optimizer = OPTIMIZERS["adagrad with a prior"]
  rows, gradient = (jax.random.normal(jax.random.key(i), (1, 6, 3)) for i in range(2))
  moved = []
  for padding in (0, 4):
    padded = [jnp.pad(x, ((0, 0), (0, padding), (0, 0))) for x in (rows, gradient)]
    rule = table_step.MoveRule(optimizer, 0.1)
    after, _ = table_step.move_rows(padded[0], table_step.row_state(optimizer, padded[0], 3), padded[1], rule, 3)
    moved.append(after[:, :6])
  np.testing.assert_allclose(*moved, rtol=1e-6)


def test_by_default_a_row_that_is_met_seldom_moves_little() -> None:
  """One update of the table's typical gradient is not learned by heart; a row with many has its own pace."""
  rate = config.Tables().learning_rate
  optimizer = row_optimizers.make_row_optimizer(config.Tables())
  gradient = jnp.full((2, WIDTH), 3.0)  # the typical one of the table
  row, slots = jnp.zeros((2, WIDTH)), {"sum": jnp.float32([0.0, 9.0 * 10_000])}
  moved, _ = optimizer.move(row, slots, gradient, jnp.float32(rate), jnp.float32(9.0))
  seldom, often = np.abs(np.asarray(moved))[:, 0] / rate
  assert 0 < seldom < 0.2
  assert often == pytest.approx(1 / 100, rel=0.01)


@pytest.mark.parametrize(
  ("name", "per_line"),
  quick_few([("adagrad with a prior", 1), ("adam", 4), ("sgd", 4)], itertools.product(OPTIMIZERS, [1, 4])),
)
def test_a_gradient_for_every_row_moves_rows_as_touching_all_of_them_does(name: str, per_line: int) -> None:
  optimizer = OPTIMIZERS[name]
  rows = jax.random.normal(jax.random.key(0), (5, 8 // per_line, 3 * per_line))
  gradient = jax.random.normal(jax.random.key(1), rows.shape)
  slots = table_step.row_state(optimizer, rows, 3)
  rule = table_step.MoveRule(optimizer, 0.1, scale=0.5, decay=0.01)
  index = jnp.arange(40, dtype=jnp.int32)
  touched = Touched(index, gradient.reshape(40, 3), jnp.zeros(1, jnp.int32))
  for one, other in zip(
    jax.tree.leaves(table_step.move_rows(rows, slots, gradient, rule, 3)),
    jax.tree.leaves(table_step.move_rows(rows, slots, touched, rule)),
    strict=True,
  ):
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
