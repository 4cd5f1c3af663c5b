import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from supermoe_jax import config, device_mesh, sharding
from supermoe_jax.batch import Schema
from supermoe_jax.errors import ConfigError
from supermoe_jax.layers.moe import MoE
from supermoe_jax.training.step import abstract_model
from tests.fixtures import grids


def test_a_spec_maps_logical_names_to_mesh_axes() -> None:
  assert sharding.spec("batch", None, "mlp") == PartitionSpec(("data", "expert"), None, "tensor")


def test_two_names_on_one_mesh_axis_are_an_error() -> None:
  with pytest.raises(ValueError, match="one mesh axis on two dimensions"):
    sharding.spec("batch", "expert")


def test_an_unknown_name_is_an_error_with_the_nearest() -> None:
  with pytest.raises(ValueError, match="did you mean 'expert'"):
    sharding.spec("experts")


def test_a_mesh_larger_than_the_machine_is_an_error() -> None:
  with pytest.raises(ConfigError, match=r"64×1×1 = 64 devices, but JAX sees 8"):
    device_mesh.make_mesh(config.Mesh(data=64))


def test_slices_that_are_not_there_are_an_error() -> None:
  with pytest.raises(
    ConfigError, match=r"slices=2, but its 8 devices lie in 1 of the 1 slices that JAX sees \(8 devices\)"
  ):
    device_mesh.make_mesh(config.Mesh(data=8, slices=2))


class Layer(nnx.Module):
  def __init__(self) -> None:
    self.divides = sharding.param(np.zeros((4, 6), np.float32), "expert", "mlp")
    self.does_not = sharding.param(np.zeros((3, 6), np.float32), "expert", "mlp")
    self.plain = nnx.Param(np.zeros(4, np.float32))


def test_parameters_are_laid_out_by_their_names_and_whole_where_they_do_not_divide() -> None:
  mesh = device_mesh.make_mesh(config.Mesh(data=2, expert=2, tensor=2))
  layouts = sharding.shardings(mesh, nnx.state(Layer(), nnx.Param))
  specs = {k: layouts[k].get_value().spec for k in ("divides", "does_not", "plain")}
  assert specs == {
    "divides": PartitionSpec("expert", "tensor"),
    "does_not": PartitionSpec(None, "tensor"),
    "plain": PartitionSpec(),
  }


BOTH = [AxisType.Auto, AxisType.Explicit]


@pytest.mark.parametrize("axis_type", grids.quick_few([AxisType.Explicit], BOTH), ids=["auto", "explicit"])
def test_a_module_is_created_in_its_place(axis_type: AxisType) -> None:
  def make() -> MoE:
    return MoE(8, 16, 4, 2, rngs=nnx.Rngs(0))

  mesh = device_mesh.make_mesh(config.Mesh(data=2, expert=2, tensor=2), axis_type=axis_type)
  moe = sharding.create(make, mesh)
  up = moe.up.get_value()
  assert {s.data.shape for s in up.addressable_shards} == {(2, 8, 8)}
  here = jax.jit(lambda: make().up.get_value())()
  np.testing.assert_allclose(up, here, atol=1e-6)  # the numbers do not depend on the mesh


def test_what_lies_whole_on_every_device_is_told_with_its_bytes() -> None:
  state = nnx.state(Layer())
  mesh = device_mesh.make_mesh(config.Mesh(data=2, expert=2, tensor=2))
  assert sharding.replicated(mesh, state, larger_than=1) == {"plain": 16}
  assert sharding.replicated(device_mesh.make_mesh(config.Mesh()), state, larger_than=1) == {}


def test_no_large_parameter_of_the_model_is_left_replicated(cfg: config.Config) -> None:
  """At a width where every kernel is large; what may lie whole is what does not grow with experts, rows or width²."""
  large = config.override(
    cfg,
    [
      "--config.model.d_model=1024",
      "--config.model.d_hidden=4096",
      "--config.model.d_expert=4096",
      "--config.model.experts=16",
      "--config.model.shared_experts=1",
      "--config.model.activation=swiglu",
    ],
  )
  fields = {n: 1 << 20 for n, f in cfg.data.fields.items() if f.kind != "numeric"}
  outputs = {n: (1 << 20) - 2 if isinstance(t, config.NextEvent) else 8 for n, t in cfg.active_tasks.items()}
  schema = Schema(tuple(cfg.data.sources), fields, ("amount",), 400, outputs, tuple(fields), (0,))
  mesh = device_mesh.make_mesh(config.Mesh(data=2, expert=2, tensor=2))
  _, state = abstract_model(large, schema)
  assert sharding.replicated(mesh, state, larger_than=2 << 20) == {}


def test_names_must_match_the_dimensions() -> None:
  with pytest.raises(ValueError, match="1 logical names for a parameter of shape"):
    sharding.param(jnp.zeros((2, 2)), "embed")


def test_constrain_without_a_mesh_changes_nothing() -> None:
  x = jnp.arange(4.0)
  assert jax.jit(lambda x: sharding.constrain(x, "batch"))(x).tolist() == x.tolist()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_function_sees_its_own_shards_and_may_sum_over_all(axis_type: AxisType) -> None:
  def local(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    assert x.shape == (2, 6)
    assert w["up"].shape == (6, 2)
    return x @ w["up"], jax.lax.psum(jnp.sum(x), sharding.axes("batch"))

  def run(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    inputs = (("batch", None), {"up": ("embed", "mlp")})
    return sharding.on_shards(local, inputs, (("batch", "mlp"), ()), x, {"up": w})

  x, w = np.arange(48, dtype=np.float32).reshape(8, 6), np.arange(24, dtype=np.float32).reshape(6, 4)
  with jax.set_mesh(device_mesh.make_mesh(config.Mesh(data=2, expert=2, tensor=2), axis_type=axis_type)):
    product, total = jax.jit(run)(x, w)
  np.testing.assert_allclose(product, x @ w)
  assert float(total) == float(x.sum())
