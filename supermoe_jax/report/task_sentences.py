"""Describes a config's tasks and model in words."""

from __future__ import annotations

from typing import cast

from supermoe_jax import config
from supermoe_jax.data.tasks import question


def task_question(task: config.Task) -> str:
  """Returns the question that a task asks, and its sample space, in words."""
  asked = question(task)
  if not task.has_labels:
    return asked
  labelled = cast(config.LabelledTask, task)
  if not labelled.sample_space:
    return asked
  asked += f", where {labelled.sample_space}"
  if labelled.out_space_weight:
    inside, outside = labelled.in_space_weight, labelled.out_space_weight
    asked += f" (in training with weight {inside:g}, elsewhere with {outside:g})"
  return asked


def views_sentence(model: config.Model) -> str:
  """Returns a sentence about how each task's head sees a user."""
  if model.conditioning == "none":
    return "Every task reads the same user representation."
  if model.conditioning == "token":
    seen = "the token's task" if model.task_ids == "true" else "a random task instead of the token's (a control)"
    return f"Each task adds a token of its own after each snapshot. The routers see {seen}."
  name = {"mmoe": "MMoE", "ple": "PLE"}[model.conditioning]
  return f"Each task reads a view of the user representation that an {name} layer makes."


def sparse_blocks(model: config.Model) -> list[int]:
  """Returns the numbers of the blocks that hold experts, counted from 1."""
  if model.encoder == "gru" or not model.moe_every:
    return []
  return list(range(model.moe_every, model.layers + 1, model.moe_every))
