"""Checkpoints of a run, through Orbax: state, data position and what is needed to read them, in one atomic step.

Tables are written by those who hold their rows, and read onto any mesh. What a checkpoint calls a row keeps its code:
where the mesh asks for other stripes, or a vocabulary has grown, the rows are laid out anew as they are read.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from supermoe_jax import config
from supermoe_jax.layers import exchange
from supermoe_jax.layers.table import TableRows
from supermoe_jax.training.statistics import TaskStatistics
from supermoe_jax.training.step import TrainState


class RunError(RuntimeError):
  """A run directory that cannot be used; the message says what to do."""


class Restored(NamedTuple):
  """A checkpoint's `state`, the data iterator's `position`, and the tasks' `statistics`."""

  state: TrainState
  position: Any
  statistics: dict[str, TaskStatistics]


class Checkpoints:
  """The checkpoints of a run directory; a context manager that waits for writing to end."""

  def __init__(self, workdir: pathlib.Path, train: config.Train):
    options = ocp.CheckpointManagerOptions(max_to_keep=train.checkpoints_kept)
    # Named here, so that their shapes can be asked for before anything was read or written.
    arrays, words = ocp.StandardCheckpointHandler, ocp.JsonCheckpointHandler
    handlers = {"model": arrays(), "state": arrays(), "data": words(), "statistics": words(), "tables": words()}
    self._manager = ocp.CheckpointManager(
      (workdir / "checkpoints").absolute(), options=options, item_names=tuple(handlers), item_handlers=handlers
    )

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *unused: object) -> None:
    self._manager.close()

  @property
  def latest(self) -> int | None:
    """The newest whole checkpoint's step; None without any."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, position: dict[str, Any], statistics: dict[str, TaskStatistics]) -> None:
    """Starts writing a checkpoint; it counts only once all of it is on disk."""
    self._manager.save(
      step,
      args=ocp.args.Composite(
        model=ocp.args.StandardSave(nnx.to_pure_dict(state.model)),
        state=ocp.args.StandardSave(_rest(state)),
        data=ocp.args.JsonSave(position),
        statistics=ocp.args.JsonSave({n: s._asdict() for n, s in statistics.items()}),
        tables=ocp.args.JsonSave(_table_sizes(state.model)),
      ),
    )

  def restore(self, step: int, state: TrainState) -> Restored:
    """Reads a checkpoint into the layout of `state`; rows that it has more than the checkpoint keep their values.

    Raises:
      RunError: it holds another model.
    """
    striped = _striped(state.model)
    read = self._read(
      step,
      {"model": nnx.to_pure_dict(state.model), "state": _rest(state)},
      striped,
      data=ocp.args.JsonRestore(),
      statistics=ocp.args.JsonRestore(),
      tables=ocp.args.JsonRestore(),
    )
    model = _grown(state.model, read["model"], read["tables"])
    whole = TrainState(model=model, **read["state"])
    return Restored(whole, read["data"], _statistics(read["statistics"]))

  def statistics(self, step: int) -> dict[str, TaskStatistics]:
    """Reads only the tasks' constants."""
    return _statistics(self._read(step, {}, frozenset(), statistics=ocp.args.JsonRestore())["statistics"])

  def restore_model(self, step: int, model: nnx.State) -> nnx.State:
    """Reads only the model's variables, into the layout of `model` (abstract or not).

    Rows that `model` has more than the checkpoint are 0: an untrained value says nothing.
    """
    return _with_values(model, self._read(step, {"model": nnx.to_pure_dict(model)}, _striped(model))["model"])

  def _read(
    self, step: int, trees: Mapping[str, Any], striped: frozenset[tuple[str, ...]], **others: Any
  ) -> dict[str, Any]:
    """Reads arrays into the layouts of `trees`, and other items as they are; arrays at `striped` may differ in rows."""
    try:
      saved = self._manager.item_metadata(step)
      asked = {n: _as_saved(tree, saved[n], striped) for n, tree in trees.items()}
      items = {n: ocp.args.StandardRestore(tree) for n, tree in asked.items()}
      found = self._manager.restore(step, args=ocp.args.Composite(**items, **others))
    except (ValueError, KeyError) as error:
      reason = str(error).strip().splitlines()[0]
      raise RunError(
        f"checkpoint {step} of {self._manager.directory} does not fit this model ({reason}); it was written by another "
        "version of the code or config. Train again in another --workdir."
      ) from error
    return {n: jax.tree.map(_laid_out, found[n], trees[n]) if n in trees else found[n] for n in (*trees, *others)}


def _table_sizes(model: nnx.State) -> dict[str, int]:
  """The number of codes of each table."""
  rows = (v for _, v in nnx.to_flat_state(nnx.filter_state(model, TableRows)))
  return {v.get_metadata()["table"]: v.get_metadata()["size"] for v in rows}


def _striped(model: nnx.State) -> frozenset[tuple[str, ...]]:
  """The paths of the variables that have an entry a row, `[G, M, ...]`."""
  names = ((path, v.get_metadata().get("logical") or ()) for path, v in nnx.to_flat_state(model))
  return frozenset(tuple(map(str, path)) for path, logical in names if logical[1:2] == ("rows",))


def _path(keys: tuple[Any, ...]) -> tuple[str, ...]:
  return tuple(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in keys)


def _as_saved(tree: Any, saved: Any, striped: frozenset[tuple[str, ...]]) -> Any:
  """What to ask a checkpoint for: the arrays of `tree`, those with an entry a row in the shape that they have there."""
  shapes = {_path(p): leaf.shape for p, leaf in jax.tree_util.tree_flatten_with_path(getattr(saved, "tree", saved))[0]}

  def ask(keys: tuple[Any, ...], wanted: Any) -> Any:
    path = _path(keys)
    rows = "slots" in path or any(path[-len(s) :] == s or path[-len(s) - 1 : -1] == s for s in striped)
    there = shapes.get(path)
    if not rows or there is None or there == wanted.shape or there[2:] != wanted.shape[2:]:
      return wanted
    return jax.ShapeDtypeStruct(there, wanted.dtype, sharding=_dividing(there, wanted.sharding))

  return jax.tree_util.tree_map_with_path(ask, tree)


def _dividing(shape: tuple[int, ...], layout: NamedSharding) -> NamedSharding:
  """`layout`, with its devices on another dimension where they do not divide the stripes."""
  names = layout.spec[1] if len(layout.spec) > 1 else None
  ways = math.prod(layout.mesh.shape[a] for a in ((names,) if isinstance(names, str) else names or ()))
  if shape[1] % ways == 0:
    return layout
  return NamedSharding(layout.mesh, PartitionSpec(names if shape[0] % ways == 0 else None))


def _laid_out(value: Any, wanted: Any) -> Any:
  """What was read in other stripes, or with fewer rows, as it is wanted."""
  if not hasattr(value, "shape") or value.shape == wanted.shape:
    return value
  return jax.jit(exchange.restriped, static_argnums=1, out_shardings=wanted.sharding)(value, wanted.shape)


def _grown(model: nnx.State, values: dict[str, Any], sizes: Mapping[str, int]) -> nnx.State:
  """`model` with what was read; of a table with more rows than the checkpoint's `sizes` those keep their values."""
  read = _with_values(model, values)

  def rows(variable: nnx.Variable, fresh: nnx.Variable) -> nnx.Variable:
    before = sizes.get(variable.get_metadata().get("table", ""), 0) if isinstance(variable, TableRows) else 0
    if not before or before >= variable.get_metadata()["size"]:
      return variable
    value = variable.get_value()

    def merge(value: jax.Array, fresh: jax.Array) -> jax.Array:
      code = jnp.arange(value.shape[0] * value.shape[1]).reshape(value.shape[:2])
      return jnp.where((code < before)[..., None], value, fresh)

    return variable.replace(jax.jit(merge, out_shardings=value.sharding)(value, fresh.get_value()))

  return jax.tree.map(rows, read, model, is_leaf=lambda v: isinstance(v, nnx.Variable))


def _statistics(saved: dict[str, Any]) -> dict[str, TaskStatistics]:
  return {n: TaskStatistics(**s) for n, s in saved.items()}


def _rest(state: TrainState) -> dict[str, Any]:
  return {k: v for k, v in state._asdict().items() if k != "model"}


def _with_values(model: nnx.State, values: dict[str, Any]) -> nnx.State:
  filled = jax.tree.map(lambda leaf: leaf, model)
  nnx.replace_by_pure_dict(filled, values)
  return filled
