"""Saves and restores checkpoints of a run through Orbax, each in one atomic step.

A checkpoint holds the training state, the data position, and what is needed to read them. Each process writes and
reads the arrays that it holds, on any mesh (`reshard_tables`). A checkpoint also holds checksums of everything in it: a
damaged one is recognised, and the one before it is read instead.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from orbax.checkpoint import checkpoint_managers as managers

import supermoe_jax
from supermoe_jax import config
from supermoe_jax.distributed import processes
from supermoe_jax.errors import RunError
from supermoe_jax.training.checkpoints import checksums, reshard_tables
from supermoe_jax.training.step import TrainState
from supermoe_jax.training.task_losses import TaskStatistics

logger = processes.first_process_only(logging.getLogger(__name__))

# The directory next to `checkpoints/` that keeps damaged checkpoints.
DAMAGED = "damaged"

# Packages whose versions decide whether a step gives the same bits.
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "supermoe_jax")

_WORDS = "run"

# The prefix of a reason that is no damage, and TensorStore's words in such a case.
_NOW = "now: "
_PASSING = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Too many open files")


class RestoredState(NamedTuple):
  """The content of a checkpoint.

  Attributes:
    state: everything that a step changes.
    position: the position of the data iterator.
    statistics: the tasks' constants.
    waiting: metrics of steps that are in no row of the log yet.
    versions: versions of the libraries that wrote the checkpoint.
  """

  state: TrainState
  position: Any
  statistics: dict[str, TaskStatistics]
  waiting: list[Any]
  versions: dict[str, str]


class RestoredModel(NamedTuple):
  """A checkpoint's step, the model's `variables` and the tasks' `statistics`."""

  step: int
  variables: nnx.State
  statistics: dict[str, TaskStatistics]


class _Found(NamedTuple):
  step: int
  arrays: dict[str, Any]
  words: dict[str, Any]


class Checkpoints:
  """A reader of the checkpoints of a run directory: it changes nothing there, so the run may be training."""

  def __init__(self, workdir: pathlib.Path):
    """Opens the checkpoints of `workdir`."""
    self.workdir, self.directory = workdir, (workdir / "checkpoints").absolute()
    self.damaged: list[int] = []  # steps that were tried and could not be read

  @property
  def steps(self) -> list[int]:
    """Returns the steps of all checkpoints, the newest first; a checkpoint counts once all of it is written."""
    found = self.directory.iterdir() if self.directory.is_dir() else ()
    return sorted((int(p.name) for p in found if p.name.isdigit()), reverse=True)

  def restore(self, state: TrainState) -> RestoredState | None:
    """Reads the newest whole checkpoint into the layout of `state`; returns None if there is no checkpoint.

    If `state` has more table rows than the checkpoint, the further rows keep their values, or are 0 if it is abstract.

    Raises:
      RunError: no checkpoint is whole and of this model, or one cannot be read for a reason that may pass.
    """

    found = self._newest({"model": nnx.to_pure_dict(state.model), "state": _rest(state)}, state.model)
    if found is None:
      return None
    model = reshard_tables.with_more_rows(state.model, found.arrays["model"], found.words["tables"])
    whole = TrainState(model=model, **found.arrays["state"])
    words = found.words
    return RestoredState(whole, words["position"], _statistics(words), words["waiting"], words["versions"])

  def restore_model(self, model: nnx.State, step: int | None = None) -> RestoredModel | None:
    """Reads only the model's variables, into the layout of `model` (abstract or not); otherwise as `restore`.

    If `model` has more table rows than the checkpoint, the further rows are 0: an untrained value carries no
    information. `step` names a checkpoint; None: the newest whole one.

    Raises:
      RunError: as `restore`, or checkpoint `step` is missing or damaged.
    """
    if step is not None and step not in self.steps:
      raise RunError(f"{self.directory} holds no checkpoint {step}; there are {', '.join(map(str, self.steps))}.")
    found = self._newest({"model": nnx.to_pure_dict(model)}, model, step)
    if found is None:
      return None
    return RestoredModel(found.step, reshard_tables.with_values(model, found.arrays["model"]), _statistics(found.words))

  def _newest(self, trees: Mapping[str, Any], model: nnx.State, only: int | None = None) -> _Found | None:
    """Reads arrays into the layouts of `trees`, from the newest checkpoint whole on all hosts or from step `only`."""
    striped, reasons = reshard_tables.striped(model), []
    tried = self.steps if only is None else [only]
    for step in json.loads(processes.gather_text(json.dumps(tried))[0][1]):  # as the first host sees them
      found, reason = None, ""
      try:
        found = self._read(step, trees, striped)
      except Exception as error:  # Orbax, TensorStore and JSON may raise any error on a damaged file
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        if _passes(error):
          reason = _NOW + reason
      reason = next((f"{r}{name}" for name, r in processes.gather_text(reason) if r), "")
      if reason.startswith(_NOW):
        raise RunError(
          f"checkpoint {step} of {self.directory} cannot be read: {reason.removeprefix(_NOW)}. That need not be its "
          "fault, so it is kept, and no other is used; see to it, and give the same command again."
        )
      if found is not None and not reason:
        # Checksums are sums over all devices, so every host gets the same.
        held = {n: checksums.array_checksums(found.arrays[n]) for n in trees}
        wrong = [f"{n}/{p}" for n in trees for p in _differences(found.words["digests"][n], held[n])]
        if not wrong:
          laid = {n: jax.tree.map(reshard_tables.laid_out_as, found.arrays[n], trees[n]) for n in trees}
          return found._replace(arrays=laid)
        reason = f"{', '.join(wrong[:3])} {'is' if len(wrong) == 1 else 'are'} not what was written"
      reasons.append(f"{step}: {reason}")
      self.damaged.append(step)
      logger.warning(f"checkpoint {step} of {self.directory} cannot be used ({reason})")
    if not reasons:
      return None
    if only is not None and (others := [step for step in self.steps if step != only]):
      raise RunError(
        f"a checkpoint of {self.directory} cannot be used ({'; '.join(reasons)}). Name another one with --checkpoint: "
        f"{', '.join(map(str, others))}."
      )
    raise RunError(
      f"no checkpoint of {self.directory} can be used ({'; '.join(reasons)}). They are damaged, or were written by "
      "another version of the code; nothing was changed. Put a copy back, or train again in another --workdir."
    )

  def _read(self, step: int, trees: Mapping[str, Any], striped: frozenset[tuple[str, ...]]) -> _Found:
    """Reads this host's part of a checkpoint; arrays at the paths `striped` may differ in their number of rows.

    It calls Orbax' handlers directly, since Orbax' manager makes hosts wait for each other: a host that found a damaged
    file would leave the others waiting.
    """
    folder = epath.Path(self.directory / str(step))
    words = ocp.JsonCheckpointHandler().restore(folder / _WORDS)
    if words.pop("digest", None) != checksums.json_checksum(words):
      raise ValueError(f"{_WORDS}/metadata is not what was written")
    handler, arrays = ocp.StandardCheckpointHandler(), {}
    for name, tree in trees.items():
      try:
        asked = reshard_tables.saved_shapes(tree, handler.metadata(folder / name), striped)
        arrays[name] = handler.restore(folder / name, args=ocp.args.StandardRestore(asked))
      except (ValueError, KeyError) as error:
        raise ValueError(f"{name}/ does not fit this model: {str(error).strip().splitlines()[0]}") from error
    return _Found(step, arrays, words)


class _Manager(ocp.CheckpointManager):
  """A manager that saves only on request: the loop asks JAX for signals itself, since each question moves a counter."""

  def reached_preemption(self, step: int) -> bool:
    """Returns False; see the base class."""
    del step
    return False


@dataclasses.dataclass
class _KeepNewestAndBest(managers.PreservationPolicy):
  """A policy that keeps the newest `n` checkpoints, and the checkpoints at the steps that `best` returns."""

  n: int
  best: Callable[[], Collection[int]]

  def should_preserve(
    self, checkpoints: Sequence[managers.PolicyCheckpointInfo], *, context: managers.PreservationContext
  ) -> Sequence[bool]:
    """Returns whether to keep each of `checkpoints`, where the newest come last; see the base class."""
    del context
    best, newest = self.best(), len(checkpoints) - self.n
    return [i >= newest or each.step in best for i, each in enumerate(checkpoints)]


class CheckpointWriter:
  """A writer of the checkpoints of a run directory: a context manager that on exit waits for writing to end."""

  def __init__(
    self,
    workdir: pathlib.Path,
    train: config.Train,
    about: Mapping[str, Any] | None = None,
    best: Callable[[], Collection[int]] = tuple,
  ):
    """Opens the checkpoints of `workdir` for writing.

    Args:
      workdir: the run directory.
      train: gives the number of checkpoints to keep.
      about: further content of each checkpoint, for JSON.
      best: returns steps to keep in addition to the newest.

    Raises:
      RunError: the run has written metrics, but its checkpoints are gone.
    """
    self.workdir, self.directory, self._about = workdir, (workdir / "checkpoints").absolute(), dict(about or {})
    options = ocp.CheckpointManagerOptions(
      preservation_policy=_KeepNewestAndBest(train.checkpoints_kept, best),
      cleanup_tmp_directories=True,  # removes what a killed run left half-written
    )
    arrays, words = ocp.StandardCheckpointHandler, ocp.JsonCheckpointHandler
    handlers = {"model": arrays(), "state": arrays(), _WORDS: words()}
    if not self.directory.is_dir() and _has_rows(workdir / "metrics.jsonl"):
      raise RunError(
        f"{self.directory} is gone, of a run that has written some of {workdir / 'metrics.jsonl'}; nothing is "
        "overwritten. Bring it back, or name another --workdir."
      )
    self._manager = _Manager(self.directory, options=options, item_names=tuple(handlers), item_handlers=handlers)

  def __enter__(self) -> CheckpointWriter:
    return self

  def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
    try:
      self._manager.close()
    except Exception as error:
      if kind is None:
        raise self._failed(error) from error

  def save(
    self,
    step: int,
    state: TrainState,
    position: dict[str, Any],
    statistics: dict[str, TaskStatistics],
    waiting: Sequence[Any] = (),
  ) -> None:
    """Starts writing a checkpoint; it counts only once all of it is on disk. For its parts see `RestoredState`.

    Raises:
      RunError: this checkpoint cannot be written, or the previous one could not be.
    """
    trees = {"model": nnx.to_pure_dict(state.model), "state": _rest(state)}
    words = {
      "position": position,
      "statistics": {n: s._asdict() for n, s in statistics.items()},
      "waiting": list(waiting),
      "tables": reshard_tables.table_sizes(state.model),
      "versions": versions(),
      "about": self._about,
      "digests": {name: checksums.array_checksums(tree) for name, tree in trees.items()},
    }
    words = json.loads(json.dumps(words))  # numbers as a reader will get them
    words["digest"] = checksums.json_checksum(words)
    items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    items[_WORDS] = ocp.args.JsonSave(words)
    if not self.directory.is_dir():
      raise RunError(
        f"{self.directory} is gone; step {step} is not saved, since what was there is lost or its disk is no longer "
        "mounted. Bring it back and train again, or name another --workdir."
      )
    try:
      self._manager.save(step, args=ocp.args.Composite(**items))
    except Exception as error:
      raise self._failed(error) from error

  def check(self) -> None:
    """Raises a RunError if a checkpoint could not be written since the last call."""
    try:
      self._manager.check_for_errors()
    except Exception as error:
      raise self._failed(error) from error

  def wait(self) -> None:
    """Waits until every saved checkpoint is on disk."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._failed(error) from error

  def set_aside(self, steps: list[int]) -> None:
    """Moves the damaged checkpoints `steps` to `damaged/`, so that good ones can take their places."""
    if processes.is_first() and steps:
      kept = self.workdir / DAMAGED
      kept.mkdir(exist_ok=True)
      for step in steps:
        taken = sum(p.name.split("-")[0] == str(step) for p in kept.iterdir())
        (self.directory / str(step)).rename(kept / (f"{step}-{taken + 1}" if taken else str(step)))
    if steps:
      processes.meet("damaged checkpoints set aside")
      self._manager.reload()

  def _failed(self, error: Exception) -> RunError:
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    return RunError(
      f"a checkpoint could not be written to {self.directory}: {reason}. Those that are there are whole: make room, or "
      "see to its rights, and give the same command again to go on from the newest."
    )


def versions() -> dict[str, str]:
  """Returns the versions of the libraries that decide whether a step gives the same bits."""
  return {name: importlib.metadata.version(name) for name in LIBRARIES}


def code_hash() -> str:
  """Returns a hash of the package's own code."""
  package = pathlib.Path(supermoe_jax.__file__).parent
  found = hashlib.sha256()
  for file in sorted(package.rglob("*.py")):
    found.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
  return found.hexdigest()[:16]


def _passes(error: Exception) -> bool:
  """Returns whether the cause of a read error may lie outside the checkpoint."""
  if isinstance(error, OSError):
    return not isinstance(error, FileNotFoundError)
  return any(word in str(error) for word in _PASSING)


def _has_rows(file: pathlib.Path) -> bool:
  return file.is_file() and file.stat().st_size > 0


def _differences(wanted: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
  return sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))


def _statistics(words: Mapping[str, Any]) -> dict[str, TaskStatistics]:
  return {n: TaskStatistics(**s) for n, s in words["statistics"].items()}


def _rest(state: TrainState) -> dict[str, Any]:
  return {k: v for k, v in state._asdict().items() if k != "model"}
