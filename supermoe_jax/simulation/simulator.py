"""Writes a simulated log as files, with the score of the Bayes-optimal predictor of each task.

`latent_users` simulates the users: the settings choose how much tasks are related or in conflict, and how rare labels
are. Since the posterior is exact, the best answer to every task is exact too, and a model's result can be read as a
share of the possible. The next item, which needs all bits, is a task of every simulation.

Labels are missing at random for training users only (`label_rate`); all labels of validation and test users are known.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score

from supermoe_jax import config
from supermoe_jax.atomic_files import replacing_directory
from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data.encoding.splits import SPLITS, TRAIN
from supermoe_jax.errors import DataError, SimulationError
from supermoe_jax.simulation.latent_users import (
  NEXT_ITEM,
  START,
  SimulatedTask,
  SimulatedUsers,
  Simulation,
  World,
  build_world,
  draw_population,
  posterior,
  predictive,
  raw_split,
  visible_counts,
)

CUTOFF = 10  # k of the next item's NDCG@k
VERSION = 1  # of the map from settings to files; files of another version are refused
FILES = ("events.parquet", "users.parquet", "truth.parquet", "simulation.json", "possible.json")
DATASET = "dataset"  # the folder, next to the files, of the dataset that is prepared from them


@dataclasses.dataclass(frozen=True)
class BayesScore:
  """A task's metric of the Bayes-optimal predictor and of the best constant one, on the same realised labels.

  The Bayes-optimal predictor is best in expectation: on finitely many labels another one may be better by chance.
  """

  metric: str
  bayes: float
  constant: float
  labels: int

  def share(self, score: float) -> float:
    """Returns a model's metric on a scale from the constant (0) to the Bayes-optimal predictor (1)."""
    return (score - self.constant) / (self.bayes - self.constant)


class Simulated(NamedTuple):
  """A folder's simulation: its settings, and the Bayes scores of every task by split ("validation", "test")."""

  simulation: Simulation
  bayes: dict[str, dict[str, BayesScore]]


def bayes_scores(
  simulation: Simulation, world: World, population: SimulatedUsers, split: Literal["validation", "test"]
) -> dict[str, BayesScore]:
  """Scores the Bayes-optimal predictor of each task on the labels that evaluation asks for.

  The predictor sees the events before the snapshot of `split`, like a model that reads the whole history. A user label
  counts for the users of the split, the next item for all users; users without a visible event have no snapshot.

  Metrics: AUC; for several classes the mean AUC of one against the rest; RMSE of the label standardised by the known
  training labels, as preparation does; NDCG@10 over the whole catalogue. Constants: AUC 0.5, the training labels' mean,
  and the items by popularity.

  Raises:
    SimulationError: there is no user to score, or none or all of the users have a class.
  """
  day, end = {
    "validation": (simulation.validation, simulation.test),
    "test": (simulation.test, simulation.days),
  }[split]
  counts = visible_counts(simulation, population, day)
  visible = counts.sum(axis=1).astype(np.int64)
  belief = posterior(world.log_item, counts)
  scores = {}
  asked = np.flatnonzero((visible > 0) & (population.split == SPLITS[split]))
  if simulation.tasks and not len(asked):
    raise SimulationError(f"no {split} user has an event before the snapshot; simulate more users.")
  for task in simulation.tasks:
    told = (population.split == TRAIN) & population.known[task.name]
    label, best = population.label[task.name], belief[asked] @ world.answer[task.name]
    if task.form == "regression":
      scores[task.name] = _regression(task, label[asked], label[told], best)
    else:
      scores[task.name] = _areas(task, label[asked], best)
  following = np.minimum(population.offset[:-1] + visible, len(population.time) - 1)
  inside = (visible < np.diff(population.offset)) & (population.time[following] < end * MICROSECONDS_PER_DAY)
  asked = np.flatnonzero((visible > 0) & inside)
  if not len(asked):
    raise SimulationError(f"no user has an event after the {split} snapshot; simulate more users, events or days.")
  target = population.item[following[asked]]
  popularity = np.tile(np.exp(world.log_item).mean(axis=0), (len(asked), 1))
  bayes, constant = ndcg(predictive(world.log_item, belief[asked]), target), ndcg(popularity, target)
  return {**scores, NEXT_ITEM: BayesScore(f"ndcg@{CUTOFF}", bayes, constant, len(asked))}


def _areas(task: SimulatedTask, label: np.ndarray, probability: np.ndarray) -> BayesScore:
  """Scores class probabilities `[n, C]` for the classes `label [n]`."""
  classes = range(probability.shape[1]) if task.form == "multiclass" else (1,)
  for c in classes:
    if not 0 < np.sum(label == c) < len(label):
      raise SimulationError(f"task {task.name}: all or none of {len(label)} users have class {c}; simulate more users.")
  auc = float(np.mean([roc_auc_score(label == c, probability[:, c]) for c in classes]))
  return BayesScore("auc", auc, 0.5, len(label))


def _regression(task: SimulatedTask, label: np.ndarray, training: np.ndarray, expected: np.ndarray) -> BayesScore:
  if len(training) < 2:
    raise SimulationError(f"task {task.name}: {len(training)} training users have a label; simulate more users.")
  mean, deviation = training.mean(), training.std()

  def rmse(predicted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((label - predicted) ** 2)) / deviation)

  return BayesScore("rmse", rmse(expected), rmse(np.full(len(label), mean)), len(label))


def ndcg(score: np.ndarray, target: np.ndarray) -> float:
  """Returns NDCG@10 of one relevant item a row: `score [n, I]`, `target [n]`; equal scores count against the target."""
  rank = (score >= np.take_along_axis(score, target[:, None], axis=1)).sum(axis=1)
  return float(np.mean(np.where(rank <= CUTOFF, 1 / np.log2(1 + rank), 0.0)))


# --------------------------------------------------------------------------------------------------------------- files


def simulate(simulation: Simulation, folder: str | pathlib.Path) -> Simulated:
  """Writes the simulation's files into `folder`, all or none; reads them if they are there already.

  events.parquet: `user, time, item`. users.parquet: `user` and a column a task, null where the label is unknown.
  truth.parquet, which no model may read: `user, split, bits`, and for each task the true probability of "1", the
  probabilities of all classes, or the expected value. simulation.json: the settings and the Bayes scores.
  possible.json: the test scores `bayes` and `constant` of each task, for reports.

  Raises:
    SimulationError: the settings describe no simulation.
    DataError: `folder` holds something else, or a simulation with other settings.
  """
  folder = pathlib.Path(folder)
  if folder.is_file():
    raise DataError(f"{folder} is a file; name another folder.")
  if folder.is_dir() and any(folder.iterdir()):
    return _reuse(simulation, folder)
  world = build_world(simulation)
  population = draw_population(simulation, world)
  splits: tuple[Literal["validation", "test"], ...] = ("validation", "test")
  bayes: dict[str, dict[str, BayesScore]] = {s: bayes_scores(simulation, world, population, s) for s in splits}
  described = {
    "version": VERSION,
    "simulation": dataclasses.asdict(simulation),
    "bayes": {s: {n: dataclasses.asdict(b) for n, b in tasks.items()} for s, tasks in bayes.items()},
  }
  possible = {n: {"bayes": b.bayes, "constant": b.constant} for n, b in bayes["test"].items()}
  with replacing_directory(folder) as work:
    pq.write_table(_events(simulation, population), work / "events.parquet")
    pq.write_table(_users(simulation, population), work / "users.parquet")
    pq.write_table(_truth(simulation, world, population), work / "truth.parquet")
    (work / "simulation.json").write_text(json.dumps(described, indent=1) + "\n")
    (work / "possible.json").write_text(json.dumps(possible, indent=1) + "\n")
  return Simulated(simulation, bayes)


def _events(simulation: Simulation, population: SimulatedUsers) -> pa.Table:
  owner = np.repeat(np.arange(simulation.users), np.diff(population.offset))
  start = config.parse_time(START, "START")
  return pa.table(
    {
      "user": pa.array(population.user_id).take(pa.array(owner)),
      "time": pa.array(start + population.time, pa.timestamp("us", tz="UTC")),
      "item": pa.array([f"i{i}" for i in range(simulation.items)]).take(pa.array(population.item)),
    }
  )


def _users(simulation: Simulation, population: SimulatedUsers) -> pa.Table:
  columns = {"user": pa.array(population.user_id)}
  for task in simulation.tasks:
    label, unknown = population.label[task.name], ~population.known[task.name]
    number = label if task.form == "regression" else label.astype(np.int64)
    columns[task.name] = pa.array(number, mask=unknown)
  return pa.table(columns)


def _truth(simulation: Simulation, world: World, population: SimulatedUsers) -> pa.Table:
  columns = {
    "user": pa.array(population.user_id),
    "split": pa.array([list(SPLITS)[s] for s in population.split]),
    "bits": pa.array(world.states[population.state].tolist(), pa.list_(pa.int8())),
  }
  for task in simulation.tasks:
    answer = world.answer[task.name][population.state]
    columns[task.name] = pa.array((answer[:, 1] if task.form == "binary" else answer).tolist())
  return pa.table(columns)


def read_simulation(folder: str | pathlib.Path) -> Simulated:
  """Reads the simulation that `simulate` wrote.

  Raises:
    DataError: `folder` holds no whole simulation, or one that another version wrote.
  """
  folder = pathlib.Path(folder)
  for name in FILES:
    if not (folder / name).is_file():
      raise DataError(
        f"{folder} holds no whole simulation: {name} is missing; name another folder, or remove this one."
      )
  found = json.loads((folder / "simulation.json").read_text())
  if found["version"] != VERSION:
    raise DataError(
      f"{folder}/simulation.json: version {found['version']}, but this program writes version {VERSION}; remove the "
      "folder to simulate again."
    )
  raw: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found["simulation"].items()}
  simulation = Simulation(**{**raw, "tasks": tuple(SimulatedTask(**t) for t in raw["tasks"])})
  bayes = {s: {n: BayesScore(**b) for n, b in tasks.items()} for s, tasks in found["bayes"].items()}
  return Simulated(simulation, bayes)


def _reuse(simulation: Simulation, folder: pathlib.Path) -> Simulated:
  found = read_simulation(folder)
  old, new = (json.loads(json.dumps(dataclasses.asdict(s))) for s in (found.simulation, simulation))
  different = config.differences(old, new, "simulation")
  if different:
    raise DataError(
      f"{folder} holds a simulation with other settings ({'; '.join(different)}) and is not overwritten; name another "
      "folder, or remove this one."
    )
  return found


# -------------------------------------------------------------------------------------------------------------- config


def simulation_config(folder: str | pathlib.Path) -> dict[str, Any]:
  """Returns the `data` and `tasks` sections of a config for the simulation in `folder`; the dataset goes there too.

  `model.max_events` must be at least `events[1]`, so that a model sees what the Bayes-optimal predictor sees.
  Aggregates are off, since the items alone determine the posterior of the bits.

  Raises:
    DataError: `folder` holds no whole simulation, or one that another version wrote.
  """
  folder = pathlib.Path(folder)
  simulation = read_simulation(folder).simulation
  data = {
    "path": str(folder / DATASET),
    "sources": {"log": {"files": str(folder / "events.parquet"), "user": "user", "time": "time"}},
    "fields": {"item": {}},
    "users": {"files": str(folder / "users.parquet"), "user": "user"},
    "split": raw_split(simulation),
    "aggregates": {"enabled": False},
  }
  tasks: dict[str, Mapping[str, Any]] = {}
  for task in simulation.tasks:
    positive = {"positive": ("1",)} if task.form == "binary" else {}
    tasks[task.name] = {"kind": "user_label", "column": task.name, "type": task.form, **positive}
  tasks[NEXT_ITEM] = {"kind": "next_event", "field": "item"}
  return {"data": data, "tasks": tasks}
