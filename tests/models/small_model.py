"""Small models of every kind over random features, without a dataset."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from supermoe_jax import config
from supermoe_jax.data.batches import CALENDAR, Features
from supermoe_jax.data.schema import Schema
from supermoe_jax.models.supermoe import SuperMoE

B, L, S, D, E, K = 4, 10, 3, 16, 4, 2

M = TypeVar("M", bound=nnx.Module)

# One of each kind; `secret` and the second numeric field are no inputs.
TASKS: dict[str, config.Task] = {
  "click": config.EventLabel(field="secret", positive=("1",), given=("item", "device"), per_snapshot=2),
  "next": config.NextEvent(field="item"),
  "quiet": config.FutureEvent(source="visits"),
  "pairs": config.Contrast(),
  "topics": config.FutureValues(field="item", top=3),
  "plan": config.UserLabel(column="plan", type="multiclass"),
  "age": config.UserLabel(column="age", type="regression"),
}
LABELLED = tuple(n for n in TASKS if n != "pairs")
T = len(LABELLED)

SCHEMA = Schema(
  sources=("visits", "buys"),
  categorical={"item": 9, "secret": 5, "device": 4},
  numeric=("seconds", "price"),
  aggregates=3,
  outputs={"click": 1, "next": 7, "quiet": 1, "topics": 3, "plan": 1, "age": 1},
  inputs=("item", "device"),
  numeric_inputs=(0,),
)

MODEL = config.Model(
  d_model=D, layers=2, heads=2, d_hidden=24, moe_every=1, experts=E, experts_per_token=K, d_expert=12, dropout=0.0,
  max_events=L, view_experts=3, task_experts=2, view_hidden=10,
)  # fmt: skip


def random_features(seed: int = 0) -> Features:
  """Rows of 10, 7, 4 and 0 events; the last snapshot of row 1 is padding."""
  rng = np.random.default_rng(seed)
  length = np.array([L, 7, 4, 0], np.int32)
  real = np.arange(L) < length[:, None]
  valid = np.ones((B, S), bool)
  valid[1, -1] = False
  return Features(
    codes=np.stack([rng.integers(0, n, (B, L)) * real for n in SCHEMA.categorical.values()], axis=-1).astype(np.int32),
    source=(rng.integers(1, 3, (B, L)) * real).astype(np.int32),
    numeric=np.where(real[..., None], rng.normal(size=(B, L, 2)), np.nan).astype(np.float32),
    calendar=rng.normal(size=(B, L, CALENDAR)).astype(np.float32),
    time=np.sort(rng.uniform(0, 900, (B, L))).astype(np.float32),
    gap=rng.uniform(0, 90, (B, L)).astype(np.float32),
    segment=real.astype(np.int32),
    query_events=np.array([[3, 6, 10], [0, 5, 7], [1, 2, 4], [0, 0, 0]], np.int32),
    query_segment=valid.astype(np.int32),
    query_time=rng.uniform(900, 950, (B, S)).astype(np.float32),
    query_gap=rng.uniform(0, 90, (B, S)).astype(np.float32),
    query_calendar=rng.normal(size=(B, S, CALENDAR)).astype(np.float32),
    query_aggregates=rng.normal(size=(B, S, SCHEMA.aggregates)).astype(np.float32),
  )


def random_given(seed: int = 1) -> np.ndarray:
  """Codes of the fields that `click` is given, at its L + 2 S sites."""
  rng = np.random.default_rng(seed)
  return np.stack([rng.integers(0, n, (B, L + 2 * S)) for n in (9, 4)], axis=-1).astype(np.int32)


def build(tasks: Mapping[str, config.Task] = TASKS, **settings: Any) -> SuperMoE:
  """A model as it starts."""
  return SuperMoE(dataclasses.replace(MODEL, **settings), SCHEMA, tasks, rngs=nnx.Rngs(params=0))


def filled(tasks: Mapping[str, config.Task] = TASKS, **settings: Any) -> SuperMoE:
  """A model whose parameters are noise, none of them 0; a parameter depends on its name and shape only."""
  return noise(lambda: build(tasks, **settings))


def noise(make: Callable[[], M]) -> M:
  """A module of noise, which compiles nothing."""
  graph, state = nnx.split(nnx.eval_shape(make))
  for path, variable in nnx.to_flat_state(state):
    rng = np.random.default_rng(zlib.crc32("/".join(map(str, path)).encode()))
    value = rng.normal(size=variable.shape, scale=0.3) + (path[-1] == "scale")
    variable.set_value(jnp.asarray(value, jnp.float32))
  return nnx.merge(graph, state)


def copy_tasks(source: SuperMoE, target: SuperMoE) -> SuperMoE:
  """Gives `target`, whose tasks are some of `source`'s in any order, the parameters of `source`."""
  picked = np.array([source.view_names.index(n) for n in target.view_names])
  values = dict(nnx.to_flat_state(nnx.state(source, nnx.Param)))
  for path, variable in nnx.to_flat_state(nnx.state(target, nnx.Param)):
    value = values[path].get_value()
    if path[-1] == "task_kernel":  # [M, T, E]
      value = value[:, picked]
    elif path[-1] == "task_vectors" or path[-2:] == ("gates", "kernel"):  # [T, …]
      value = value[picked]
    variable[...] = value
  return target


class Everything(NamedTuple):
  """All that a model gives for a batch."""

  z: np.ndarray
  events: np.ndarray
  views: np.ndarray | None
  gates: np.ndarray | None
  expert: np.ndarray
  task_expert: np.ndarray | None
  answers: dict[str, np.ndarray]


def outputs(model: SuperMoE, features: Features, given: jax.Array, *, dropless: bool = True) -> Everything:
  """Encodes a batch and asks every task at all of its sites."""
  encoded = model.encode(features, dropless=dropless)
  answers = {n: model.answers(n, encoded, events=True, given=given if n == "click" else None) for n in model.view_names}
  experts = encoded.experts
  parts: Any = (encoded.z, encoded.events, encoded.views, encoded.gates, experts.stats.expert, experts.task_expert)
  return Everything(*parts, answers)


def jitted(model: SuperMoE) -> Callable[..., Everything]:
  """`(features, given, state) → Everything`, dropless and compiled; by default with the model's own state."""
  graph, state = nnx.split(model)
  run = jax.jit(lambda state, features, given: outputs(nnx.merge(graph, state, copy=True), features, given))
  given = random_given()

  def call(features: Features, given: np.ndarray = given, state: nnx.State = state) -> Everything:
    return jax.tree.map(np.asarray, run(state, features, given))

  return call


def without(tasks: Mapping[str, config.Task], names: Sequence[str]) -> dict[str, config.Task]:
  """The tasks but some."""
  return {n: t for n, t in tasks.items() if n not in names}
