"""Defines the result of one trained and evaluated model of a study, and how it is kept as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from supermoe_jax.seesaw.gains import constant_score

# The variant name of all single-task references.
SINGLE = "single"

# Parts that files of earlier versions lack, and that are then empty.
_EMPTY = ("expert_load", "constants", "constant_scores", "labels")


@dataclasses.dataclass(frozen=True)
class RunResult:
  """The result of one trained and evaluated model.

  `tasks[task][split][metric]` are its scores on `labels[task][split]` labels. `losses[task]` are training losses over
  the loss of the best constant prediction, `constants[task]`. `constant_scores[task][split]` are the main metrics of an
  answer that ignores the user, where a metric does not tell them by itself; see `constant`. `weights` has `step` and
  each task's weights at these steps; `cosine` has the `matrix` of gradient cosines in the order of its `tasks`;
  `expert_load[task]` has the `load [M, E]` of the MoE layers and, if gates mix the tasks' views, a `gate [E]`.
  """

  variant: str
  seed: int
  task: str | None
  config_hash: str
  tasks: Mapping[str, Mapping[str, Mapping[str, float | None]]]
  main_metric: Mapping[str, str]
  losses: Mapping[str, float | None]
  parameters: int
  active_parameters: int
  seconds: float
  weights: Mapping[str, Sequence[float | None]] | None = None
  cosine: Mapping[str, Any] | None = None
  expert_load: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  constants: Mapping[str, float] = dataclasses.field(default_factory=dict)
  labels: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
  constant_scores: Mapping[str, Mapping[str, float | None]] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    if (self.variant == SINGLE) != (self.task is not None):
      raise ValueError(f"run of {self.variant!r} with task={self.task!r}: runs of {SINGLE!r}, and no others, name one.")

  @classmethod
  def from_json(cls, found: Mapping[str, Any]) -> RunResult:
    """Reads the output of `to_json`. Raises ValueError if a key is missing or unknown."""
    fields = {f.name for f in dataclasses.fields(cls)}
    optional = {"weights", "cosine", *_EMPTY}
    if wrong := (fields - optional - set(found)) | (set(found) - fields):
      what = f"variant {found.get('variant')!r}, seed {found.get('seed')!r}"
      raise ValueError(
        f"run result of {what}: missing or unknown keys {sorted(wrong)}; run it again with this version."
      )
    return cls(**{**found, **{k: found.get(k) or {} for k in _EMPTY}})

  def to_json(self) -> dict[str, Any]:
    """Returns the run as JSON types; numbers that are not finite become None."""
    out: dict[str, Any] = plain(dataclasses.asdict(self))
    return out

  def score(self, task: str, split: str = "test") -> float | None:
    """Returns the main metric of `task` on `split`; None if there is none or it is not finite."""
    metrics = self.tasks.get(task, {}).get(split) or {}
    return _finite(metrics.get(self.main_metric.get(task, "")))

  def constant(self, task: str, split: str = "test") -> float | None:
    """Returns the main metric of an answer to `task` that ignores the user; None if it is not known.

    It is what the run recorded, or follows from the metric's name or its other metrics (`gains.constant_score`). A file
    of an earlier version recorded none, so rankings have no constant there.
    """
    recorded = self.constant_scores.get(task, {}).get(split)
    if recorded is not None:
      return _finite(recorded)
    metrics = self.tasks.get(task, {}).get(split) or {}
    return _finite(constant_score(self.main_metric.get(task, ""), metrics))


def _finite(value: Any) -> float | None:
  return None if value is None or not math.isfinite(value) else float(value)


def plain(value: Any) -> Any:
  """Returns a value as JSON types; numbers that are not finite become None."""
  if isinstance(value, Mapping):
    return {k: plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple, np.ndarray)):
    return [plain(v) for v in value]
  if isinstance(value, np.generic):
    value = value.item()
  return _finite(value) if isinstance(value, float) else value
