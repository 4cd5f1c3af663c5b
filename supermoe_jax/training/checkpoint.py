"""Checkpoints of a run, through Orbax: state, data position and what is needed to read them, in one atomic step."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from flax import nnx

from supermoe_jax import config
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
    self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

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
      ),
    )

  def restore(self, step: int, state: TrainState) -> Restored:
    """Reads a checkpoint into the layout of `state` (abstract or not).

    Raises:
      RunError: it holds another model.
    """
    read = self._read(
      step,
      model=ocp.args.StandardRestore(nnx.to_pure_dict(state.model)),
      state=ocp.args.StandardRestore(_rest(state)),
      data=ocp.args.JsonRestore(),
      statistics=ocp.args.JsonRestore(),
    )
    model = _with_values(state.model, read.model)
    whole = TrainState(model=model, **read.state)
    return Restored(whole, read.data, _statistics(read.statistics))

  def statistics(self, step: int) -> dict[str, TaskStatistics]:
    """Reads only the tasks' constants."""
    return _statistics(self._read(step, statistics=ocp.args.JsonRestore()).statistics)

  def restore_model(self, step: int, model: nnx.State) -> nnx.State:
    """Reads only the model's variables, into the layout of `model` (abstract or not)."""
    return _with_values(model, self._read(step, model=ocp.args.StandardRestore(nnx.to_pure_dict(model))).model)

  def _read(self, step: int, **items: Any) -> Any:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except (ValueError, KeyError) as error:
      reason = str(error).strip().splitlines()[0]
      raise RunError(
        f"checkpoint {step} of {self._manager.directory} does not fit this model ({reason}); it was written by another "
        "version of the code or config. Train again in another --workdir."
      ) from error


def _statistics(saved: dict[str, Any]) -> dict[str, TaskStatistics]:
  return {n: TaskStatistics(**s) for n, s in saved.items()}


def _rest(state: TrainState) -> dict[str, Any]:
  return {k: v for k, v in state._asdict().items() if k != "model"}


def _with_values(model: nnx.State, values: dict[str, Any]) -> nnx.State:
  filled = jax.tree.map(lambda leaf: leaf, model)
  nnx.replace_by_pure_dict(filled, values)
  return filled
