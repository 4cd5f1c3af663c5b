"""Reading compiled programs: shapes, loops, groups of devices, and what is moved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from supermoe_jax.plan import arithmetic, collectives, hlo, traffic

HEAD = "HloModule m\n\n"


@pytest.mark.parametrize(
  ("text", "size", "padded", "space"),
  [
    ("f32[8,512]{1,0}", 8 * 512 * 4, 8 * 512 * 4, 0),
    ("f32[3,64]{1,0:T(8,128)}", 3 * 64 * 4, 8 * 128 * 4, 0),  # a narrow row takes a whole lane of 128
    ("bf16[10,3,64]{2,1,0:T(8,128)(2,1)}", 10 * 3 * 64 * 2, 10 * 8 * 128 * 2, 0),
    ("bf16[4,64,256]{1,2,0:T(8,128)(2,1)S(1)}", 4 * 64 * 256 * 2, 4 * 256 * 128 * 2, 1),
    ("pred[]{:T(128)}", 1, 128, 0),
    ("f32[100]{0:T(128)}", 400, 512, 0),
    ("s4[16]{0}", 8, 8, 0),
  ],
)
def test_shapes_and_what_tiles_make_of_them(text: str, size: int, padded: int, space: int) -> None:
  (shape,) = hlo.parse_shapes(text)
  assert (shape.bytes, shape.padded, shape.space) == (size, padded, space)


@pytest.mark.parametrize(
  ("text", "groups"),
  [
    ("replica_groups={{0,1},{2,3}}", ((0, 1), (2, 3))),
    ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
    ("replica_groups={}", ((0, 1, 2, 3),)),
    ("source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", ((0, 1), (2, 3))),
  ],
)
def test_groups_of_devices_in_every_form(text: str, groups: tuple[tuple[int, ...], ...]) -> None:
  line = f"  %x = f32[8]{{0}} all-reduce(%y), channel_id=1, {text}, to_apply=%add"
  module = hlo.parse_module(
    HEAD + "ENTRY %main (p: f32[8]) -> f32[8] {\n  %y = f32[8]{0} parameter(0)\n" + line + "\n}\n"
  )
  (found,) = collectives.read_collectives(module, 4)
  assert {frozenset(g) for g in found.groups} == {frozenset(g) for g in groups}
  assert found.sent == pytest.approx(2 * 32 * (len(groups[0]) - 1) / len(groups[0]))


def test_a_collective_that_is_laid_out_over_a_chain_counts_once() -> None:
  line = "  %{} = f32[64]{{0}} all-gather(%y), channel_id={}, replica_groups={{{{0,1}}}}, frontend_attributes={{{}}}\n"
  body = line.format("a", 7, 'chain_id="0"') + line.format("b", 7, 'chain_id="0"') + line.format("c", 8, "")
  module = hlo.parse_module(
    HEAD + "ENTRY %main (p: f32[32]) -> f32[64] {\n  %y = f32[32]{0} parameter(0)\n" + body + "}\n"
  )
  assert [c.bytes for c in collectives.read_collectives(module, 2)] == [256, 256]


def test_what_goes_from_slice_to_slice_is_handed_to_the_hosts() -> None:
  line = "  %s{0} = (f32[64]{{0}}, u32[], token[]) send(%y, %t), channel_id={0}, is_host_transfer=true, "
  line += 'frontend_attributes={{_xla_megascale_transfer_type="{1}"}}\n'
  body = "".join(line.format(i, kind) for i, kind in enumerate(("ALL_REDUCE", "ALL_GATHER", "ALL_TO_ALL")))
  head = "ENTRY %main (p: f32[64]) -> f32[64] {\n  %y = f32[64]{0} parameter(0)\n  %t = token[] after-all()\n"
  found = collectives.read_collectives(hlo.parse_module(HEAD + head + body + "}\n"), 8, 2)
  assert all(c.network and c.members == 2 for c in found)
  assert {c.kind: c.sent for c in found} == {"all-reduce": 256, "all-gather": 256, "all-to-all": 128}


def test_groups_in_a_form_that_is_not_known_are_an_error() -> None:
  text = (
    "ENTRY %main (p: f32[8]) -> f32[8] {\n  %x = f32[8]{0} all-reduce(%y), replica_groups=everyone, to_apply=%a\n}\n"
  )
  with pytest.raises(ValueError, match="in an unknown form"):
    collectives.read_collectives(hlo.parse_module(HEAD + text), 8)


def compiled(function, *arguments) -> tuple[hlo.HloModule, float]:
  traced = jax.jit(function).trace(*arguments)
  return hlo.parse_module(traced.lower().compile().as_text()), arithmetic.products(traced.jaxpr.jaxpr)


def test_what_stands_in_loops_counts_as_often_as_it_runs() -> None:
  mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
  spread = NamedSharding(mesh, PartitionSpec("x"))
  x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=spread)
  w = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))

  def step(x: jax.Array, w: jax.Array) -> jax.Array:
    def twice(x: jax.Array, each: jax.Array) -> tuple[jax.Array, None]:
      def once(_: int, y: jax.Array) -> jax.Array:
        mean = jnp.mean(jnp.sin(y), axis=0, keepdims=True)
        return jnp.sin(y @ each) + mean

      return jax.lax.fori_loop(0, 3, once, x), None

    return jax.lax.scan(twice, x, w)[0]

  module, flops = compiled(step, x, w)
  (reduce,) = {(c.kind, c.bytes) for c in collectives.read_collectives(module, 4)}
  assert reduce == ("all-reduce", 64)
  assert sum(c.times for c in collectives.read_collectives(module, 4)) == 15
  assert not hlo.count_runs(module).unknown
  assert flops == 15 * 2 * 8 * 16 * 16


def test_a_loop_that_ends_by_what_it_finds_is_told() -> None:
  module, _ = compiled(
    lambda x: jax.lax.while_loop(lambda v: v[0] < v[1], lambda v: v + jnp.array([2, 1]), x), jnp.zeros(2, int)
  )
  assert len(hlo.count_runs(module).unknown) == 1


def test_of_a_table_only_the_rows_that_are_read_and_written_count() -> None:
  table = jnp.zeros((100_000, 64))
  rows = jnp.arange(0, 1000, 10)

  def step(table: jax.Array) -> jax.Array:
    return table.at[rows].add(jnp.sin(table[rows]), unique_indices=True)

  text = jax.jit(step, donate_argnums=0).lower(table).compile().as_text()
  assert traffic.memory_traffic(hlo.parse_module(text)) < 100 * 64 * 4 * 20 < table.nbytes / 10


def test_products_count_recomputation_shards_and_gradients() -> None:
  mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
  a, b = jnp.zeros((6, 4)), jnp.zeros((4, 10))
  one = 2 * 6 * 4 * 10

  def loss(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(jnp.sin(a @ b)))

  def flops(function) -> float:
    return arithmetic.products(jax.jit(function).trace(a, b).jaxpr.jaxpr, 2)

  assert flops(loss) == one
  assert flops(jax.grad(loss, argnums=(0, 1))) == 3 * one
  assert flops(jax.grad(jax.checkpoint(loss), argnums=(0, 1))) == 4 * one
  spread = jax.shard_map(loss, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec()), out_specs=PartitionSpec())
  assert flops(spread) == 2 * one
  ragged = jax.jit(lambda a, b: jax.lax.ragged_dot(a, b[None], jnp.array([6]))).trace(a, b).jaxpr.jaxpr
  assert arithmetic.products(ragged) == one
