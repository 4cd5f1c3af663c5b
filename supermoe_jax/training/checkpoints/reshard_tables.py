"""Lays the table rows of a checkpoint out for the mesh that reads them.

Every row keeps its code. Where the mesh needs other stripes, or a vocabulary has grown, the rows move as they are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from supermoe_jax.layers import exchange
from supermoe_jax.layers.table import TableRows
from supermoe_jax.layers.tpu_lines import LANES


def table_sizes(model: nnx.State) -> dict[str, int]:
  """Returns the number of codes of each table."""
  rows = (v for _, v in nnx.to_flat_state(nnx.filter_state(model, TableRows)))
  return {v.get_metadata()["table"]: v.get_metadata()["size"] for v in rows}


def striped(model: nnx.State) -> frozenset[tuple[str, ...]]:
  """Returns the paths of the variables that have one entry a row, `[G, M]` or `[G, M / p, p·D]`."""
  names = ((path, v.get_metadata().get("logical") or ()) for path, v in nnx.to_flat_state(model))
  return frozenset(tuple(map(str, path)) for path, logical in names if logical[1:2] == ("rows",))


def path(keys: tuple[Any, ...]) -> tuple[str, ...]:
  """Returns the names on a leaf's path in a tree."""
  return tuple(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in keys)


def saved_shapes(tree: Any, saved: Any, striped: frozenset[tuple[str, ...]]) -> Any:
  """Returns the arrays to ask a checkpoint for: `tree`, but arrays with one entry a row in their `saved` shape."""
  shapes = {path(p): leaf.shape for p, leaf in jax.tree_util.tree_flatten_with_path(getattr(saved, "tree", saved))[0]}

  def ask(keys: tuple[Any, ...], wanted: Any) -> Any:
    at = path(keys)
    rows = "slots" in at or any(at[-len(s) :] == s or at[-len(s) - 1 : -1] == s for s in striped)
    there = shapes.get(at)
    if not rows or there is None or there == wanted.shape or not _as_wide(there, wanted.shape):
      return wanted
    return jax.ShapeDtypeStruct(there, wanted.dtype, sharding=_dividing(there, wanted.sharding))

  return jax.tree_util.tree_map_with_path(ask, tree)


def _as_wide(there: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
  """Returns whether both shapes may hold rows of one width, each alone or several to a line (`layers.tpu_lines`)."""
  if len(there) != len(wanted) or len(there) == 2:
    return len(there) == len(wanted)
  fewer, more = sorted((there[2], wanted[2]))
  return fewer == more or (more % LANES == 0 and more % fewer == 0)


def _dividing(shape: tuple[int, ...], layout: NamedSharding) -> NamedSharding:
  """Returns `layout`; if its devices do not divide the stripes, they go to dimension 0 or each holds the whole."""
  names = layout.spec[1] if len(layout.spec) > 1 else None
  ways = math.prod(layout.mesh.shape[a] for a in ((names,) if isinstance(names, str) else names or ()))
  if shape[1] % ways == 0:
    return layout
  return NamedSharding(layout.mesh, PartitionSpec(names if shape[0] % ways == 0 else None))


def laid_out_as(value: Any, wanted: Any) -> Any:
  """Returns an array that was read in other stripes, or with fewer rows, in the shape and layout of `wanted`."""
  if not hasattr(value, "shape") or value.shape == wanted.shape:
    return value
  return jax.jit(exchange.restriped, static_argnums=1, out_shardings=wanted.sharding)(value, wanted.shape)


def with_values(model: nnx.State, values: dict[str, Any]) -> nnx.State:
  """Returns `model` with other values, given as a pure dict."""
  filled = jax.tree.map(lambda leaf: leaf, model)
  nnx.replace_by_pure_dict(filled, values)
  return filled


def with_more_rows(model: nnx.State, values: dict[str, Any], sizes: Mapping[str, int]) -> nnx.State:
  """Returns `model` with the values that were read.

  If a table has more rows than the checkpoint's `sizes`, the further rows keep their values, or are 0 if `model` is
  abstract.
  """
  read = with_values(model, values)

  def rows(variable: nnx.Variable, fresh: nnx.Variable) -> nnx.Variable:
    before = sizes.get(variable.get_metadata().get("table", ""), 0) if isinstance(variable, TableRows) else 0
    if not before or before >= variable.get_metadata()["size"]:
      return variable
    value = variable.get_value()
    if isinstance(fresh.get_value(), jax.ShapeDtypeStruct):
      return variable

    def merge(value: jax.Array, fresh: jax.Array) -> jax.Array:
      g, lines, wide = value.shape
      width = variable.get_metadata()["width"]
      code = jnp.arange(value.size // width).reshape(g, lines, -1)
      return jnp.where(jnp.repeat(code < before, width, axis=2, total_repeat_length=wide), value, fresh)

    return variable.replace(jax.jit(merge, out_shardings=value.sharding)(value, fresh.get_value()))

  return jax.tree.map(rows, read, model, is_leaf=lambda v: isinstance(v, nnx.Variable))
