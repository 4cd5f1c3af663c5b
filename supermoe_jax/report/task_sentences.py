"""What a config's tasks and model are, in words."""

from __future__ import annotations

from collections.abc import Sequence

from supermoe_jax import config


def task_question(task: config.Task) -> str:
  """Says in words what a task asks, and of which samples."""
  asked = _asked(task)
  if isinstance(task, config.Contrast) or not task.sample_space:
    return asked
  asked += f", where {task.sample_space}"
  if task.out_space_weight:
    asked += f" (in training with weight {task.in_space_weight:g}, elsewhere with {task.out_space_weight:g})"
  return asked


def _asked(task: config.Task) -> str:
  if isinstance(task, config.NextEvent):
    seen = ", those already in the history left out" if task.exclude_seen else ""
    return f"which {task.field} comes next, ranked among all{seen}"
  if isinstance(task, config.FutureEvent):
    return f"{'no' if task.negate else 'any'} event of {task.source} within {task.horizon_days:g} days"
  if isinstance(task, config.FutureValues):
    return f"which of the {task.top} most frequent values of {task.field} occur within {task.horizon_days:g} days"
  if isinstance(task, config.EventLabel):
    return _event_question(task)
  if isinstance(task, config.Contrast):
    return (
      f"whether two slices of up to {task.slice_events} events are of one user; trained by contrast, without a metric"
    )
  if task.type == "multiclass":
    return f"which value {task.column} has"
  if task.type == "regression":
    return f"the number {task.column}, in standard deviations from its mean"
  return f"{task.column} is {_listed(task.positive)}"


def _event_question(task: config.EventLabel) -> str:
  if task.positive:
    asked = f"whether {task.field} of the next event is {_listed(task.positive)}"
  elif task.at_least is not None:
    asked = f"whether {task.field} of the next event is at least {task.at_least:g}"
  else:
    asked = f"the number {task.field} of the next event, in standard deviations from its mean"
  if task.given:
    asked += f", given its {', '.join(task.given)}"
  return asked + f"; asked of the {task.per_snapshot} events after a snapshot"


def _listed(values: Sequence[str]) -> str:
  listed = ", ".join(values[:4]) + (", …" if len(values) > 4 else "")
  return listed if len(values) == 1 else f"one of {listed}"


def views_sentence(model: config.Model) -> str:
  """Says in words what the tasks' heads see of a user."""
  if model.conditioning == "none":
    return "Every task reads the same user representation."
  if model.conditioning == "token":
    told = "its task" if model.task_ids == "true" else "another task, drawn at random (a control)"
    return f"Each task has a token of its own beside each user representation, and the routers are told {told}."
  if model.conditioning == "gate":
    return "Each task has a gate of its own over the experts of the last layer that has them."
  name = {"mmoe": "MMoE", "ple": "PLE"}[model.conditioning]
  return f"Each task reads a view of the user representation that an {name} layer makes."


def sparse_blocks(model: config.Model) -> list[int]:
  """The blocks that hold experts, counted from 1."""
  if model.encoder == "gru" or not model.moe_every:
    return []
  return list(range(model.moe_every, model.layers + 1, model.moe_every))
