"""A report of a run: one HTML page that needs nothing beside it, made from what lies in the run directory.

Every part may be missing but the config; its section then names the command that makes it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import pathlib
import platform
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
from flax import nnx
from markupsafe import Markup
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from supermoe_jax import config
from supermoe_jax import report_figures as figures
from supermoe_jax.data import labels as labels_lib
from supermoe_jax.data.dataset import Dataset, Schema
from supermoe_jax.data.events import DataError
from supermoe_jax.report_figures import number, percent
from supermoe_jax.serving import embed
from supermoe_jax.training.step import abstract_model

# Points of the map: t-SNE takes about 10 s for so many.
MOST_POINTS = 3000
# Records read for each point wanted; users without an event before the time of the map have no point.
RECORDS_A_POINT = 4
# Below this many labels a difference between two scores is mostly chance, and the page says so.
FEW_LABELS = 500

LOWER_IS_BETTER = ("log_loss", "ece")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "supermoe_jax")


def write(workdir: pathlib.Path) -> pathlib.Path:
  """Writes `WORKDIR/report.html` and returns its path.

  Raises:
    ConfigError: `workdir` is not a run directory.
    DataError: a file of the run is damaged.
  """
  workdir = pathlib.Path(workdir)
  run = _read(workdir)
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters.update(number=number, percent=percent, score=_score)
  page = environment.get_template("report.html.jinja").render(_page(run))
  file = workdir / "report.html"
  temporary = file.with_suffix(".html.incomplete")
  temporary.write_text(page, encoding="utf-8")
  temporary.replace(file)
  return file


class _Parts(NamedTuple):
  """What lies in a run directory; None where a part is missing."""

  workdir: pathlib.Path
  cfg: config.Config
  rows: list[dict[str, Any]]
  evaluation: dict[str, Any] | None
  manifest: dict[str, Any] | None
  embeddings: dict[str, Any] | None

  @property
  def same_data(self) -> bool:
    """Whether the dataset is there and was prepared as this run wants it."""
    return self.manifest is not None and self.manifest.get("data_hash") == self.cfg.data_hash()

  @property
  def step(self) -> int:
    """The last step known of."""
    parts = (self.evaluation, self.embeddings, self.rows[-1] if self.rows else None)
    return max((int(p["step"]) for p in parts if p), default=0)


def _read(workdir: pathlib.Path) -> _Parts:
  cfg = config.load_json(workdir / "config.json")
  rows = []
  metrics = workdir / "metrics.jsonl"
  for line in metrics.read_text().splitlines() if metrics.is_file() else ():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:  # a run that is being written, or was cut
      break
  return _Parts(
    workdir,
    cfg,
    rows,
    _json(workdir / "evaluation.json"),
    _json(pathlib.Path(cfg.data.path) / "manifest.json"),
    _json(workdir / "embeddings" / "manifest.json"),
  )


def _json(file: pathlib.Path) -> dict[str, Any] | None:
  if not file.is_file():
    return None
  try:
    found: dict[str, Any] = json.loads(file.read_text())
  except json.JSONDecodeError as error:
    raise DataError(f"{file} is damaged ({error}); delete it and run the command that made it again.") from None
  return found


def _page(run: _Parts) -> dict[str, Any]:
  where = shlex.quote(str(run.workdir))
  test = run.cfg.data.split.test
  return {
    "title": run.workdir.resolve().name,
    "workdir": str(run.workdir),
    "run": run,
    "commands": {
      "prepare": "supermoe prepare --config CONFIG",
      "train": f"supermoe train --config CONFIG --workdir {where}",
      "evaluate": f"supermoe evaluate --workdir {where}",
      "embed": f"supermoe embed --workdir {where} --as-of {test[-1] if test else 'TIME'}",
    },
    "notes": list(_notes(run)),
    "parameters": _parameters(run),
    "tasks": {n: _question(t) for n, t in run.cfg.active_tasks.items()},
    "headline": _headline(run),
    "metrics": _metrics(run),
    "lower_is_better": LOWER_IS_BETTER,
    "label_shares": _label_shares(run),
    "training": _training(run),
    "experts": _experts(run),
    "map": _map(run),
    "config_text": json.dumps(config.to_dict(run.cfg), indent=2, ensure_ascii=False),
    "versions": _versions(),
    "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
  }


def _notes(run: _Parts) -> Iterator[str]:
  """Says where the parts do not belong together: what a reader would otherwise compare in error."""
  if run.manifest is not None and not run.same_data:
    yield (
      f"The dataset at {run.cfg.data.path} was prepared with another configuration than this run's; the data facts "
      "below describe what lies there now, not what the run was trained on."
    )
  parts = (
    ("The evaluation shown here was", run.evaluation, "evaluate"),
    ("The embeddings shown here were", run.embeddings, "embed --overwrite"),
  )
  for what, part, verb in parts:
    if part is None:
      continue
    again = f"run 'supermoe {verb}' again to bring this up to date."
    if part["step"] < run.step:
      yield f"{what} made at step {part['step']:,}, but the run has reached step {run.step:,}; {again}"
    if part.get("config_hash") not in (None, run.cfg.hash()):
      yield f"{what} made with another config than the one in this directory; {again}"


def _score(value: float | None, *, signed: bool = False) -> str:
  """Writes a metric; a minus is a minus sign, a missing value a dash."""
  if value is None or not math.isfinite(value):
    return "–"
  return f"{value:{'+' if signed else ''}.4f}".replace("-", "−")


def _versions() -> dict[str, str]:
  found = {"python": platform.python_version()}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def _question(task: config.Task) -> str:
  """Says in words what a task asks."""
  if isinstance(task, config.NextEvent):
    seen = ", those already in the history left out" if task.exclude_seen else ""
    return f"which {task.field} comes next, ranked among all{seen}"
  if isinstance(task, config.FutureEvent):
    return f"{'no' if task.negate else 'any'} event of {task.source} within {task.horizon_days:g} days"
  if isinstance(task, config.FutureValues):
    return f"which of the {task.top} most frequent values of {task.field} occur within {task.horizon_days:g} days"
  listed = ", ".join(task.positive[:4]) + (", …" if len(task.positive) > 4 else "")
  return f"{task.column} is {listed}" if len(task.positive) == 1 else f"{task.column} is one of {listed}"


# ------------------------------------------------------------------------------------------------------- model, metrics


def _parameters(run: _Parts) -> dict[str, int] | None:
  """Counts the model's parameters by building it without allocating it; needs the dataset's numbers of codes."""
  if run.manifest is None or not run.same_data:
    return None
  codes = {n: f["codes"] for n, f in run.manifest["fields"].items() if "codes" in f}
  outputs = {}
  for name, task in run.cfg.tasks.items():
    many = codes[task.field] - 2 if isinstance(task, config.NextEvent) else 1
    outputs[name] = task.top if isinstance(task, config.FutureValues) else many
  data, model = run.cfg.data, run.cfg.model
  numeric = tuple(n for n, f in data.fields.items() if f.kind == "numeric")
  schema = Schema(tuple(data.sources), codes, numeric, len(run.manifest["aggregates"]["mean"]), outputs)
  _, variables = abstract_model(run.cfg, schema)
  total = tables = idle = 0
  for path, variable in nnx.to_flat_state(nnx.filter_state(variables, nnx.Param)):
    size = math.prod(variable.get_value().shape)
    total += size
    tables += size if {"event_embedding", "fields"} <= set(path) else 0
    if "expert" in (variable.get_metadata().get("logical") or ()):
      idle += size * (model.experts - model.experts_per_token) // model.experts
  return {"total": total, "tables": tables, "rest": total - tables, "active": total - tables - idle}


def _sparse_blocks(model: config.Model) -> list[int]:
  """The blocks that hold experts, counted from 1."""
  return [i for i in range(1, model.layers + 1) if model.moe_every > 0 and i % model.moe_every == 0]


def _headline(run: _Parts) -> dict[str, Any] | None:
  if run.evaluation is None:
    return None
  results, main = run.evaluation["splits"]["test"], run.evaluation["main_metric"]
  baselines = list(dict.fromkeys(b for t in results.values() for b in t["baselines"]))
  rows, dots = [], []
  for name, task in results.items():
    metric = main[name]
    own, others = task["metrics"].get(metric), {b: v.get(metric) for b, v in task["baselines"].items()}
    best = max((v for v in others.values() if v is not None), default=None)
    difference = None if own is None or best is None else own - best
    top = max((v for v in (own, best) if v is not None), default=None)
    rows.append({"task": name, "labels": task["labels"], "metric": metric, "run": own, "baselines": others})
    rows[-1] |= {"difference": difference, "top": top}
    dots.append(figures.Scores(name, metric, own, others))
  compared = [r for r in rows if r["difference"] is not None]
  return {
    "rows": rows,
    "baselines": baselines,
    "compared": len(compared),
    "ahead": sum(r["difference"] > 0 for r in compared),
    "few": [r["task"] for r in rows if r["labels"] < FEW_LABELS],
    "few_labels": FEW_LABELS,
    "unlabelled": [n for n in run.cfg.active_tasks if n not in results],
    "figure": figures.scores("scores", dots) if dots else None,
  }


def _metrics(run: _Parts) -> list[dict[str, Any]]:
  """Everything that was measured: for each split its baselines and, for each task, a row a metric."""
  out = []
  for split, tasks in (run.evaluation or {"splits": {}})["splits"].items():
    baselines = list(dict.fromkeys(b for t in tasks.values() for b in t["baselines"]))
    rows = []
    for name, task in tasks.items():
      about = f"{task['labels']:,} labels"
      if task.get("positive") is not None:
        about += f", {percent(task['positive'])} positive"
      if task.get("unseen_in_training"):
        about += f", {task['unseen_in_training']:,} of them unseen in training"
      values = [(m, [v, *(task["baselines"].get(b, {}).get(m) for b in baselines)]) for m, v in task["metrics"].items()]
      rows.append({"task": name, "about": about, "metrics": values})
    out.append({"split": split, "baselines": baselines, "tasks": rows})
  return out


def _label_shares(run: _Parts) -> dict[str, dict[str, str]]:
  """Of each task and split: how often the label is 1, or how often the next value is one unseen in training."""
  out: dict[str, dict[str, str]] = {}
  for name, splits in (run.manifest or {"labels": {}})["labels"].items():
    task = run.cfg.tasks.get(name)
    asked = task.top if isinstance(task, config.FutureValues) else 1
    for split, count in splits.items():
      text = "–"
      if count["known"]:
        part, word = count.get("positive"), "positive"
        if part is None:
          part, word = count.get("unseen_value", 0), "unseen"
        text = f"{percent(part / (count['known'] * asked))} {word}"
      out.setdefault(name, {})[split] = text
  return out


# ---------------------------------------------------------------------------------------------------- training, experts


def _training(run: _Parts) -> dict[str, Any] | None:
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
    draw("speed", "Events per second", [r["events_per_second"] for r in rows], colour=green, zero=True),
  ]
  names = list(dict.fromkeys(n for r in rows for n in r["tasks"]))
  tasks = [
    draw(f"task-{i}", n, [r["tasks"].get(n, {}).get("loss") for r in rows], colour=figures.PURPLE)
    for i, n in enumerate(names)
  ]
  loads, blocks = [r["load"] for r in rows], _sparse_blocks(run.cfg.model)
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
    "experts": experts,
    "table": table,
  }


def _experts(run: _Parts) -> dict[str, Any] | None:
  if run.evaluation is None:
    return None
  model, load = run.cfg.model, run.evaluation.get("expert_load", {})
  some = {n: v for n, v in load.items() if v["snapshots"] and v["load"]}
  deepest = max((share for v in some.values() for layer in v["load"] for share in layer), default=1.0)
  layers = []
  for m, block in enumerate(_sparse_blocks(model)):
    shares = {n: v["load"][m] for n, v in some.items() if len(v["load"]) > m}
    if shares:
      title = f"Block {block}: share of the choices, in percent"
      figure = figures.heat_map(f"experts-{m}", title, list(shares), np.array(list(shares.values())), deepest)
      layers.append({"block": block, "figure": figure, "shares": shares})
  return {
    "layers": layers,
    "snapshots": {n: v["snapshots"] for n, v in some.items()},
    "even": 1 / model.experts,
    "deepest": deepest,
    "wide": model.experts > figures.MOST_NAMED_EXPERTS,
  }


# ------------------------------------------------------------------------------------------------------------------ map


def _map(run: _Parts) -> dict[str, Any] | None:
  """The 2-D map of the embeddings of the latest time."""
  if run.embeddings is None:
    return None
  table = embed.read(run.workdir / "embeddings")
  times = table["as_of"].cast("int64").to_numpy()
  if not len(times):
    return {"reason": "The embeddings hold no row."}
  latest = int(times.max())
  table = table.filter(times == latest)
  users = [str(u) for u in table["user_id"].to_pylist()]
  chosen, records = _sample(run, users)
  vectors = table["embedding"].take(chosen).combine_chunks().flatten().to_numpy().reshape(len(chosen), -1)
  place = project(vectors)
  if place is None:
    return {"reason": f"The embeddings as of {labels_lib.iso(latest)} are too few, or too much alike, for a map."}
  counts = table["n_events"].to_numpy()[chosen]
  sampled = [users[i] for i in chosen]
  panels = [figures.map_by_count("map-events", "events before this time", place, counts)]
  described = []
  for i, (task, (value, text)) in enumerate(pick_labels(run.cfg, records, latest).items()):
    values = np.array([value.get(u, np.nan) for u in sampled])
    panels.append(figures.map_by_label(f"map-{i}", task, place, values))
    described.append((task, text))
  return {
    "reason": "",
    "panels": panels,
    "labels": described,
    "time": labels_lib.iso(latest).replace("T00:00:00", ""),
    "points": len(place),
    "rows": len(users),
    "width": vectors.shape[1],
  }


def _sample(run: _Parts, users: Sequence[str]) -> tuple[np.ndarray, list[Mapping[str, Any]]]:
  """Draws at most MOST_POINTS rows, and their users' records where the dataset is at hand.

  Records are found by number, not by user, so it is records that are drawn: a large dataset is not read through.
  """
  random = np.random.default_rng(0)
  row = {user: i for i, user in enumerate(users)}
  if run.same_data and (pathlib.Path(run.cfg.data.path) / "event_log").is_dir():
    dataset = Dataset(run.cfg.data.path)
    found: dict[int, Mapping[str, Any]] = {}
    for index in random.permutation(len(dataset))[: MOST_POINTS * RECORDS_A_POINT]:
      record = dataset[int(index)]
      if record["user"] in row:
        found[row[record["user"]]] = record
      if len(found) == MOST_POINTS:
        break
    if found:
      order = sorted(found)
      return np.array(order), [found[i] for i in order]
  return np.sort(random.permutation(len(users))[:MOST_POINTS]), []


def project(vectors: np.ndarray) -> np.ndarray | None:
  """Places `vectors [n, D]` in the plane by t-SNE, `[n, 2]`; None when there are too few different ones."""
  if not np.isfinite(vectors).all() or len(np.unique(vectors, axis=0)) < 10:
    return None
  # Initialised by PCA, so that far-apart groups keep their places. One thread: the steps are short, and threads that
  # wait for each other made 2,500 points take three times as long on two busy cores.
  perplexity = min(30.0, (len(vectors) - 1) / 3)
  with threadpool_limits(1):
    method = TSNE(init="pca", perplexity=perplexity, max_iter=500, angle=0.7, random_state=0)
    return np.asarray(method.fit_transform(vectors))


def pick_labels(
  cfg: config.Config, records: Iterable[Mapping[str, Any]], time: int
) -> dict[str, tuple[dict[str, int], str]]:
  """Picks up to two yes-or-no tasks to colour users by: of each task a label a user, and what it is in words.

  One about the future and one about the user where there are both; of several the one with most of its rarer class.
  """
  tests = [config.parse_time(t, "config.data.split.test") for t in cfg.data.split.test]
  snapshot = min(tests, key=lambda t: abs(t - time), default=0)
  kinds = (config.FutureEvent, config.UserLabel)
  tasks = {n: t for n, t in cfg.active_tasks.items() if isinstance(t, kinds)}
  values: dict[str, dict[str, int]] = {n: {} for n in tasks}
  for record in records:
    at_test = (record["snapshot_split"] == labels_lib.TEST) & (record["snapshot_time"] == snapshot)
    for name, task in tasks.items():
      known = record[f"known_{name}"].astype(bool)
      where = np.flatnonzero(known & at_test if isinstance(task, config.FutureEvent) else known)
      if len(where):
        values[name][record["user"]] = int(record[f"label_{name}"][where[-1]] > 0)
  rarer = {n: min(sum(v.values()), len(v) - sum(v.values())) for n, v in values.items()}
  order = sorted((n for n in tasks if rarer[n]), key=lambda n: -rarer[n])
  firsts = [next((n for n in order if isinstance(tasks[n], kind)), None) for kind in kinds]
  chosen = [n for n in firsts if n is not None]
  chosen += [n for n in order if n not in chosen]
  out = {}
  for name in chosen[:2]:
    text = _question(tasks[name])
    if isinstance(tasks[name], config.FutureEvent):
      text += f", counted from the test snapshot at {labels_lib.iso(snapshot).replace('T00:00:00', '')}"
    else:
      text += " (the model has been trained on the labels of the training split's users, so this is no test)"
    out[name] = (values[name], text)
  return out
