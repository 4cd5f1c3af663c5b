"""What the sections of a run's report show: numbers, words and figures, each made from the parts of a run directory."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from supermoe_jax import config
from supermoe_jax.data import dataset
from supermoe_jax.evaluation import evaluate, metrics
from supermoe_jax.report import figures
from supermoe_jax.report.figures import number, percent

# Below this many labels a difference between two scores is mostly chance, and the page says so.
FEW_LABELS = 500


class Parts(NamedTuple):
  """What lies in a run directory; None where a part is missing."""

  workdir: pathlib.Path
  cfg: config.Config
  rows: list[dict[str, Any]]
  validation: list[dict[str, Any]]
  evaluation: dict[str, Any] | None
  manifest: dict[str, Any] | None
  embeddings: dict[str, Any] | None

  @property
  def same_data(self) -> bool:
    """Whether the dataset is there and was prepared as this run wants it."""
    if self.manifest is None or self.manifest.get("data_hash") == self.cfg.data_hash():
      return self.manifest is not None
    wanted = self.cfg.data_identity()
    return "config" in self.manifest and dataset.identity(self.manifest, wanted, appended=False) == wanted

  @property
  def step(self) -> int:
    """The last step known of."""
    parts = (self.evaluation, self.embeddings, self.rows[-1] if self.rows else None)
    return max((int(p["step"]) for p in parts if p), default=0)


def question(task: config.Task) -> str:
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


def views(model: config.Model) -> str:
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


# -------------------------------------------------------------------------------------------------------------- results


def headline(run: Parts) -> dict[str, Any] | None:
  """The main metric of each task on the test snapshots beside its baselines; None before evaluation."""
  if run.evaluation is None:
    return None
  results, main = run.evaluation["splits"]["test"], run.evaluation["main_metric"]
  baselines = list(dict.fromkeys(b for t in results.values() for b in t["baselines"]))
  rows, dots = [], []
  for name, task in results.items():
    metric = main[name]
    own, others = task["metrics"].get(metric), {b: v.get(metric) for b, v in task["baselines"].items()}
    best = metrics.best(metric, others.values())
    rows.append({"task": name, "labels": task["labels"], "metric": metric, "run": own, "baselines": others})
    rows[-1] |= {"difference": None, "gain": None, "top": metrics.best(metric, (own, best))}
    if own is not None and best is not None:
      rows[-1] |= {"difference": own - best, "gain": metrics.gain(metric, own, best)}
    dots.append(figures.Scores(name, metric, own, others))
  compared = [r for r in rows if r["difference"] is not None]
  return {
    "rows": rows,
    "baselines": baselines,
    "compared": len(compared),
    "ahead": sum(r["gain"] > 0 for r in compared),
    "lower": sorted({r["metric"] for r in rows} & metrics.LOWER_IS_BETTER),
    "few": [r["task"] for r in rows if r["labels"] < FEW_LABELS],
    "few_labels": FEW_LABELS,
    "unlabelled": [n for n in run.cfg.active_views if n not in results],
    "unmeasured": [n for n in run.cfg.active_tasks if n not in run.cfg.active_views],
    "figure": figures.scores("scores", dots) if dots else None,
  }


def metric_tables(run: Parts) -> list[dict[str, Any]]:
  """Everything that was measured: for each split its baselines and, for each task, a row a metric."""
  out = []
  for split, tasks in (run.evaluation or {"splits": {}})["splits"].items():
    baselines = list(dict.fromkeys(b for t in tasks.values() for b in t["baselines"]))
    rows = []
    for name, task in tasks.items():
      about = f"{task['labels']:,} labels"
      if task.get("positive") is not None:
        about += f", {percent(task['positive'])} positive"
      if task.get("classes") is not None:
        about += f" of {task['classes']:,} class{'es' if task['classes'] != 1 else ''}"
      if task.get("unseen_in_training"):
        about += f", {task['unseen_in_training']:,} of them unseen in training"
      values = [(m, [v, *(task["baselines"].get(b, {}).get(m) for b in baselines)]) for m, v in task["metrics"].items()]
      rows.append({"task": name, "about": about, "metrics": values})
    out.append({"split": split, "baselines": baselines, "tasks": rows})
  return out


def label_shares(run: Parts) -> dict[str, dict[str, str]]:
  """Of each task and split, in words, what its labels are; `_label_share` says what of each kind."""
  out: dict[str, dict[str, str]] = {}
  for name, splits in (run.manifest or {"labels": {}})["labels"].items():
    task = run.cfg.tasks.get(name)
    asked = task.top if isinstance(task, config.FutureValues) else 1
    for split, count in splits.items():
      out.setdefault(name, {})[split] = _label_share(count, asked)
  return out


def _label_share(count: Mapping[str, Any], asked: int) -> str:
  """Says in words what `count["known"]` labels of `asked` answers each are."""
  if not count["known"]:
    return "–"
  if "classes" in count:
    most = max(count["classes"], key=count["classes"].__getitem__)
    some = sum(n > 0 for n in count["classes"].values())
    return f"{some} class{'es' if some != 1 else ''}, {percent(count['classes'][most] / count['known'])} {most}"
  if "mean" in count:
    return f"{number(count['mean'])} ± {number(count['std'])}".replace("-", "−")
  word, part = ("positive", count["positive"]) if "positive" in count else ("unseen", count.get("unseen_value", 0))
  return f"{percent(part / (count['known'] * asked))} {word}"


# ---------------------------------------------------------------------------------------------------- training, experts


def training(run: Parts) -> dict[str, Any] | None:
  """The curves of the run's log, and their first and last values; None before the first logged step."""
  rows = run.rows
  if not rows:
    return None
  step = [r["step"] for r in rows]

  def draw(name: str, title: str, values: Sequence[float | None], **style: Any) -> Markup:
    table.append((title, [style.get("show", number)(v) if v is not None else "–" for v in (values[0], values[-1])]))
    return figures.curve(name, title, step, values, **style)

  table: list[tuple[str, list[str]]] = []
  grey, green = figures.GREY, figures.GREEN
  whole = [
    draw("loss", "Total loss", [r["loss"] for r in rows]),
    draw("gradient", "Gradient norm before clipping", [r["gradient_norm"] for r in rows], colour=grey, zero=True),
    draw("rate", "Learning rate", [r["learning_rate"] for r in rows], colour=grey, zero=True),
    draw("speed", "Events per second", [r["speed"]["events_per_second"] for r in rows], colour=green, zero=True),
  ]
  names = list(dict.fromkeys(n for r in rows for n in r["tasks"]))
  tasks = [
    draw(f"task-{i}", n, [r["tasks"].get(n, {}).get("loss") for r in rows], colour=figures.PURPLE)
    for i, n in enumerate(names)
  ]
  validation = _validation(run)
  weights = _weights(rows, table)
  loads, blocks = [r["load"] for r in rows], sparse_blocks(run.cfg.model)
  experts = [
    figures.load_over_time(f"load-{m}", f"Block {block}: share of the choices", step, np.array([x[m] for x in loads]))
    for m, block in enumerate(blocks)
    if all(len(x) > m for x in loads)
  ]
  if experts:
    dropped, balance = [r["dropped_share"] for r in rows], [r["balance_loss"] for r in rows]
    wide = figures.WIDE
    experts.append(draw("dropped", "Dropped share", dropped, colour=figures.RED, show=percent, zero=True, size=wide))
    experts.append(draw("balance", "Balance loss (1 is even)", balance, colour=figures.ORANGE, size=wide))
  return {
    "first": step[0],
    "last": step[-1],
    "thinned": len(rows) > figures.MOST_POINTS,
    "whole": whole,
    "tasks": tasks,
    "validation": validation,
    "weights": weights,
    "experts": experts,
    "table": table,
  }


def _validation(run: Parts) -> list[Markup]:
  """Draws the main metric of each task on validation snapshots over the steps, and their score."""
  step = [r["step"] for r in run.validation]
  if not step:
    return []
  drawn = [figures.curve("validation", "Score", step, [r["score"] for r in run.validation], colour=figures.GREEN)]
  for i, (name, task) in enumerate(run.cfg.active_views.items()):
    metric = evaluate.main_metric(run.cfg, task)
    values = [r["tasks"].get(name, {}).get(metric) for r in run.validation]
    drawn.append(figures.curve(f"validation-{i}", f"{name}: {metric}", step, values))
  return drawn


def _weights(rows: Sequence[dict[str, Any]], table: list[tuple[str, list[str]]]) -> Markup | None:
  """Draws the tasks' weights over the steps and enters them into the table; None where the log has none."""
  some = [r for r in rows if r.get("weights")]
  if not some:
    return None
  names = list(dict.fromkeys(n for r in some for n in r["weights"]))
  values = np.array([[r["weights"].get(n, np.nan) for n in names] for r in some], np.float64)
  table += [(f"Weight of {n}", [number(v[0]), number(v[-1])]) for n, v in zip(names, values.T)]
  return figures.weights_over_time("weights", [r["step"] for r in some], dict(zip(names, values.T)))


def experts(run: Parts) -> dict[str, Any] | None:
  """Where each task's test snapshots went in each layer of experts, and its gate; None before evaluation."""
  if run.evaluation is None:
    return None
  model, load = run.cfg.model, run.evaluation.get("expert_load", {})
  some = {n: v for n, v in load.items() if v["snapshots"] and v["load"]}
  deepest = max((share for v in some.values() for layer in v["load"] for share in layer), default=1.0)
  layers = []
  for m, block in enumerate(sparse_blocks(model)):
    shares = {n: v["load"][m] for n, v in some.items() if len(v["load"]) > m}
    if shares:
      title = f"Block {block}: share of the choices, in percent"
      figure = figures.heat_map(f"experts-{m}", title, list(shares), np.array(list(shares.values())), deepest)
      layers.append({"block": block, "figure": figure, "shares": shares})
  gates = {n: v["gate"] for n, v in load.items() if v["snapshots"] and v.get("gate")}
  mixed = max((share for v in gates.values() for share in v), default=1.0)
  return {
    "layers": layers,
    "gate": figures.heat_map(
      "gates", "Gate of each task, in percent", list(gates), np.array(list(gates.values())), mixed
    )
    if gates
    else None,
    "gates": gates,
    "tokens": model.conditioning == "token",
    "snapshots": {n: v["snapshots"] for n, v in load.items() if v["snapshots"]},
    "even": 1 / model.experts,
    "deepest": deepest,
    "wide": model.experts > figures.MOST_NAMED_EXPERTS,
  }
