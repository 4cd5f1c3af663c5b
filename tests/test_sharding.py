import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from supermoe_jax import config, sharding


def test_a_spec_maps_logical_names_to_mesh_axes() -> None:
  assert sharding.spec("batch", None, "mlp") == PartitionSpec(("data", "expert"), None, "tensor")


def test_two_names_on_one_mesh_axis_are_an_error() -> None:
  with pytest.raises(ValueError, match="one mesh axis on two dimensions"):
    sharding.spec("batch", "expert")


def test_an_unknown_name_is_an_error_with_the_nearest() -> None:
  with pytest.raises(ValueError, match="did you mean 'expert'"):
    sharding.spec("experts")


def test_a_mesh_larger_than_the_machine_is_an_error() -> None:
  with pytest.raises(config.ConfigError, match=r"64×1×1 = 64 devices, but JAX sees 8"):
    sharding.make_mesh(config.Mesh(data=64))


def test_parameters_are_laid_out_by_their_names_and_replicated_where_they_do_not_divide() -> None:
  mesh = sharding.make_mesh(config.Mesh(data=2, expert=2, tensor=2))

  class Layer(nnx.Module):
    def __init__(self) -> None:
      self.divides = sharding.param(jnp.zeros((4, 6)), "expert", "mlp")
      self.does_not = sharding.param(jnp.zeros((3, 6)), "expert", "mlp")
      self.plain = nnx.Param(jnp.zeros(4))

  layouts = sharding.shardings(mesh, nnx.state(Layer(), nnx.Param))
  specs = {k: layouts[k].get_value().spec for k in ("divides", "does_not", "plain")}
  assert specs == {
    "divides": PartitionSpec("expert", "tensor"),
    "does_not": PartitionSpec(None, "tensor"),
    "plain": PartitionSpec(),
  }


def test_names_must_match_the_dimensions() -> None:
  with pytest.raises(ValueError, match="1 logical names for a parameter of shape"):
    sharding.param(jnp.zeros((2, 2)), "embed")


def test_constrain_without_a_mesh_changes_nothing() -> None:
  x = jnp.arange(4.0)
  assert jax.jit(lambda x: sharding.constrain(x, "batch"))(x).tolist() == x.tolist()
