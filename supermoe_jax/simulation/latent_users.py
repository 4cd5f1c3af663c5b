"""Simulates users with known interests: latent bits, items that depend on the bits, and labels computed from the bits.

A user has k latent bits. Every event is an item, drawn independently of the user's other events, with
`P(item | bits) ∝ exp(sharpness · Σ affinity[item, bit] · (±1))`. With 2^k states the posterior of the bits is exact.

Bits come in groups. A group's own function is a multiplexer: the first bit selects which of the next two is the result.
The function is non-linear, but unlike a parity it can be learned step by step, since each of these two bits is
informative alone. A task's table is the function of its group with the share `1 - relatedness` of the entries changed.
Tasks of one group profit from the same non-linear features. Tasks of different groups have no features in common and
compete for the width of a model. (Opposite labels would be no conflict: a head may change the sign.)

Shapes: U users, N events in all, k bits, G = 2^k states, I items, C classes.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any, Literal, NamedTuple

import numpy as np

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data.encoding.splits import TRAIN, user_split
from supermoe_jax.errors import SimulationError

START = "2021-01-01"  # the first day of the log
NEXT_ITEM = "next_item"  # the task about the next event, which every simulation has
MOST_BITS = 12
FEWEST_BITS = 3  # of a group, as a multiplexer needs
MOST_CLASSES = 4  # that the function of a group can produce


@dataclasses.dataclass(frozen=True)
class SimulatedTask:
  """A user label that is a noisy non-linear function of the bits of one group.

  Attributes:
    name: the name of the task and of the label's column.
    group: index into `Simulation.groups`.
    form: binary: "0" or "1"; multiclass: "0", "1", …; regression: a number.
    label_rate: share of the training users whose label is known.
    relatedness: share of the table that agrees with the group's own function. 1: the same function. For a binary task
      0.5: an unrelated function; 0: the opposite function, which needs the same features as the group's own.
    noise: probability that the label is another class than the table's; for a regression the noise's standard
      deviation, where the noiseless values lie between 0.5 and 1.5 on both sides of 0.
    loss_scale: factor of a regression's label; squared errors in the label's unit grow by its square.
    classes: number of classes of a multiclass task, 2 … 4.
  """

  name: str
  group: int = 0
  form: Literal["binary", "multiclass", "regression"] = "binary"
  label_rate: float = 1.0
  relatedness: float = 1.0
  noise: float = 0.1
  loss_scale: float = 1.0
  classes: int = 3


@dataclasses.dataclass(frozen=True)
class Simulation:
  """Settings of a simulated population, its log and its calendar; days are counted from the log's start.

  Two simulations that differ only in their tasks have the same users and the same events.
  """

  users: int = 8000
  groups: tuple[int, ...] = (3, 3, 3)  # bits of each group
  items: int = 48
  sharpness: float = 1.0  # 0: events do not depend on the bits
  events: tuple[int, int] = (16, 28)  # fewest and most events of a user, over the whole log
  days: int = 100
  train_start: int = 40  # first training snapshot
  train_end: int = 70
  every_days: int = 10
  validation: int = 80
  test: int = 90
  user_validation: float = 0.15
  user_test: float = 0.25
  seed: int = 0
  tasks: tuple[SimulatedTask, ...] = ()

  @property
  def bits(self) -> int:
    """Returns k, the number of latent bits of a user."""
    return sum(self.groups)


class World(NamedTuple):
  """Probabilities that all users share.

  Attributes:
    states: int64 `[G, k]` of 0 and 1, all values of the bits; bit i of row g is bit i of the number g.
    log_item: float64 `[G, I]`, log P(item | state).
    answer: for each task float64 `[G, C]`, P(class | state) (binary: C = 2), or `[G]`, a regression's expected value.
  """

  states: np.ndarray
  log_item: np.ndarray
  answer: dict[str, np.ndarray]


class SimulatedUsers(NamedTuple):
  """Simulated users with their events and labels.

  Attributes:
    user_id: U ids.
    split: int32 `[U]`, the split in which the user's labels count; see `encoding.splits.user_split`.
    state: int64 `[U]`, index into `World.states`.
    offset: int64 `[U + 1]`; the events of user u are `offset[u]` … `offset[u + 1] - 1`.
    time: int64 `[N]`, microseconds since the log's start, ascending strictly within a user.
    item: int64 `[N]`.
    label: for each task float64 `[U]`: the class, or the number.
    known: for each task bool `[U]`, whether the user table holds the label.
  """

  user_id: list[str]
  split: np.ndarray
  state: np.ndarray
  offset: np.ndarray
  time: np.ndarray
  item: np.ndarray
  label: dict[str, np.ndarray]
  known: dict[str, np.ndarray]


# ------------------------------------------------------------------------------------------------------------- drawing


def build_world(simulation: Simulation) -> World:
  """Draws the items' affinities and the tasks' tables.

  Raises:
    SimulationError: the settings describe no simulation.
  """
  _check(simulation)
  k = simulation.bits
  states = (np.arange(2**k)[:, None] >> np.arange(k)) & 1
  affinity = _rng(simulation, "affinity").normal(size=(simulation.items, k))
  logit = simulation.sharpness * (2 * states - 1) @ affinity.T
  log_item = logit - np.logaddexp.reduce(logit, axis=1, keepdims=True)
  return World(states, log_item, {t.name: _answer(simulation, t, states) for t in simulation.tasks})


def task_table(simulation: Simulation, task: SimulatedTask) -> np.ndarray:
  """Returns the noiseless class, of a regression the sign, of every value of the group's bits: int64 `[2^bits]`.

  The group's own function is (2 · first + second) modulo the number of classes where the first bit is set, and the
  third bit elsewhere; with two classes, just the second or the third bit. The changed entries are spread over the
  classes as evenly as possible.
  """
  bits = simulation.groups[task.group]
  classes = _classes(task)
  first, second, third = ((np.arange(2**bits) >> i) & 1 for i in range(3))
  own = (2 * first + np.where(first == 1, second, third)) % classes
  rng = _rng(simulation, f"table {task.name}")
  shuffled = [rng.permutation(np.flatnonzero(own == c)) for c in rng.permutation(classes)]
  turn = np.concatenate([np.arange(len(s)) for s in shuffled])  # one entry of each class, then the next of each class
  order = np.concatenate(shuffled)[np.argsort(turn, kind="stable")]
  changed = order[: round((1 - task.relatedness) * len(own))]
  table = own.copy()
  table[changed] = (own[changed] + rng.integers(1, classes, len(changed))) % classes
  return table


def _classes(task: SimulatedTask) -> int:
  return task.classes if task.form == "multiclass" else 2


def _answer(simulation: Simulation, task: SimulatedTask, states: np.ndarray) -> np.ndarray:
  first = sum(simulation.groups[: task.group])
  bits = simulation.groups[task.group]
  entry = states[:, first : first + bits] @ (1 << np.arange(bits))
  table = task_table(simulation, task)
  if task.form == "regression":
    size = _rng(simulation, f"values {task.name}").uniform(0.5, 1.5, len(table))
    return (task.loss_scale * size * (2 * table - 1))[entry]
  classes = _classes(task)
  return np.where(np.eye(classes, dtype=bool)[table], 1 - task.noise, task.noise / (classes - 1))[entry]


def draw_population(simulation: Simulation, world: World) -> SimulatedUsers:
  """Draws the users, their events and their labels."""
  n, rng = simulation.users, _rng(simulation, "users")
  state = rng.integers(0, len(world.states), n)
  offset = np.append(0, np.cumsum(rng.integers(simulation.events[0], simulation.events[1] + 1, n)))
  owner = np.repeat(np.arange(n), np.diff(offset))
  place = np.arange(len(owner)) - offset[owner]
  # Times are sorted and shifted by their place, so that a user's times never tie and a snapshot's events are certain.
  time = rng.integers(0, simulation.days * MICROSECONDS_PER_DAY - simulation.events[1], len(owner))
  time = time[np.lexsort((time, owner))] + place
  noise = rng.gumbel(size=(len(owner), simulation.items))
  item = np.argmax(world.log_item[state[owner]] + noise, axis=1)
  user_id = [f"u{i:0{len(str(n))}d}" for i in range(n)]
  shares = config.Split(**raw_split(simulation))
  split = np.array([user_split(u, shares) for u in user_id], np.int32)
  label, known = {}, {}
  for task in simulation.tasks:
    rng = _rng(simulation, f"labels {task.name}")
    answer = world.answer[task.name][state]
    if task.form == "regression":
      label[task.name] = answer + task.loss_scale * task.noise * rng.normal(size=n)
    else:
      passed = np.cumsum(answer, axis=1)[:, :-1] <= rng.random((n, 1))
      label[task.name] = passed.sum(axis=1).astype(np.float64)
    known[task.name] = (split != TRAIN) | (rng.random(n) < task.label_rate)
  return SimulatedUsers(user_id, split, state, offset, time, item, label, known)


def _rng(simulation: Simulation, purpose: str) -> np.random.Generator:
  """Returns a separate random stream for each purpose, so that adding a task changes nothing else."""
  return np.random.default_rng([simulation.seed, zlib.crc32(purpose.encode())])


# ----------------------------------------------------------------------------------------------------------- posterior


def posterior(log_item: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Returns P(state | events) under a uniform prior: `log_item [G, I]`, `counts [n, I]` of each item → `[n, G]`."""
  log = counts @ log_item.T
  return np.exp(log - np.logaddexp.reduce(log, axis=1, keepdims=True))


def predictive(log_item: np.ndarray, belief: np.ndarray) -> np.ndarray:
  """Returns P(next item | events) from the states' posterior: `log_item [G, I]`, `belief [n, G]` → `[n, I]`."""
  return belief @ np.exp(log_item)


def visible_counts(simulation: Simulation, population: SimulatedUsers, day: float) -> np.ndarray:
  """Returns the counts of each item in a user's events before a snapshot at `day`: float64 `[U, I]`."""
  owner = np.repeat(np.arange(simulation.users), np.diff(population.offset))
  before = population.time < day * MICROSECONDS_PER_DAY
  counts = np.zeros((simulation.users, simulation.items))
  np.add.at(counts, (owner[before], population.item[before]), 1)
  return counts


# ------------------------------------------------------------------------------------------------------------ settings


def raw_split(simulation: Simulation) -> dict[str, Any]:
  """Returns the simulation's calendar as the `data.split` section of a config."""

  def day(n: int) -> str:
    return str(np.datetime64(START) + n)

  return {
    "train_start": day(simulation.train_start),
    "train_end": day(simulation.train_end),
    "every_days": float(simulation.every_days),
    "validation": (day(simulation.validation),),
    "test": (day(simulation.test),),
    "log_end": day(simulation.days),
    "user_validation": simulation.user_validation,
    "user_test": simulation.user_test,
  }


def _check(simulation: Simulation) -> None:
  """Raises SimulationError for settings that describe no simulation."""
  s = simulation

  def require(condition: bool, message: str) -> None:
    if not condition:
      raise SimulationError(message)

  require(s.users > 0 and s.items > 1, f"users={s.users} must be positive and items={s.items} at least 2.")
  require(
    bool(s.groups) and min(s.groups) >= FEWEST_BITS,
    f"groups={s.groups} must name at least one group, and at least {FEWEST_BITS} bits of each.",
  )
  require(
    s.bits <= MOST_BITS,
    f"groups={s.groups} have {s.bits} bits; more than {MOST_BITS} are too many states to enumerate.",
  )
  require(1 <= s.events[0] <= s.events[1], f"events={s.events} must be the fewest, at least 1, and the most.")
  require(
    0 < s.train_start <= s.train_end - s.every_days < s.train_end <= s.validation < s.test < s.days,
    "0 < train_start ≤ train_end - every_days < train_end ≤ validation < test < days must hold.",
  )
  names = [t.name for t in s.tasks]
  require(len(set(names)) == len(names), f"tasks: a name appears twice in {names}.")
  for task in s.tasks:
    require(
      task.name.isidentifier() and task.name not in (NEXT_ITEM, "user", "split", "bits"),
      f"tasks: {task.name!r} must be a Python identifier other than next_item, user, split and bits.",
    )
    require(
      0 <= task.group < len(s.groups), f"task {task.name}: group={task.group} is none of the {len(s.groups)} groups."
    )
    require(0 < task.label_rate <= 1, f"task {task.name}: label_rate={task.label_rate} must be in (0, 1].")
    require(0 <= task.relatedness <= 1, f"task {task.name}: relatedness={task.relatedness} must be in [0, 1].")
    require(
      task.noise >= 0 and (task.form == "regression" or task.noise < 0.5),
      f"task {task.name}: noise={task.noise} must not be negative, and for a class be less than 0.5.",
    )
    require(
      task.loss_scale > 0 and (task.loss_scale == 1 or task.form == "regression"),
      f"task {task.name}: loss_scale={task.loss_scale} must be positive, and 1 unless form='regression'.",
    )
    require(
      2 <= task.classes <= MOST_CLASSES, f"task {task.name}: classes={task.classes} must lie in 2 … {MOST_CLASSES}."
    )
