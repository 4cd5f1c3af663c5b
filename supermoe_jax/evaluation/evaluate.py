"""Evaluation of a run: every task's metrics on validation and test snapshots, beside its baselines."""

from __future__ import annotations

import json
import time as clock
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from supermoe_jax import config
from supermoe_jax.data import batches
from supermoe_jax.data import labels as labels_lib
from supermoe_jax.data.batches import Question
from supermoe_jax.data.labels import Labels
from supermoe_jax.evaluation import baselines, metrics, ranking
from supermoe_jax.evaluation.metrics import Metrics
from supermoe_jax.training.run import Run

# The metric that stands for a task in tables.
MAIN_METRIC = {"next_event": "ndcg@{k}", "future_event": "auc", "future_values": "mean_auc", "user_label": "auc"}


class _Collected(NamedTuple):
  """All questions of a split with the model's answers, host arrays in the order of the questions."""

  questions: list[Question]
  answers: dict[str, np.ndarray]
  labels: dict[str, Labels]
  seen: dict[str, list[np.ndarray]]
  expert: np.ndarray  # int32 [M, n, K]


def evaluate(run: Run) -> dict[str, Any]:
  """Evaluates both splits, writes `evaluation.json` into the run directory and returns what it holds."""
  begun = clock.monotonic()
  splits = {}
  aggregates = baselines.AggregateModels(run.dataset, list(run.cfg.active_tasks))
  for split in ("validation", "test"):
    collected = _collect(run, split)
    by_aggregates = aggregates.scores(collected.questions)
    tasks = {n: _task(run, n, t, collected, by_aggregates.get(n)) for n, t in run.cfg.active_tasks.items()}
    splits[split] = {n: v for n, v in tasks.items() if v is not None}
  load = {n: _load(run, n, collected) for n in run.cfg.active_tasks}
  result = {
    "step": run.step,
    "config_hash": run.cfg.hash(),
    "main_metric": {n: _main_metric(run.cfg, t) for n, t in run.cfg.active_tasks.items()},
    "splits": splits,
    "expert_load": load,
    "seconds": round(clock.monotonic() - begun, 1),
  }
  file = run.workdir / "evaluation.json"
  temporary = file.with_suffix(".incomplete")
  temporary.write_text(json.dumps(result, indent=1) + "\n")
  temporary.replace(file)
  return result


def _main_metric(cfg: config.Config, task: config.Task) -> str:
  return MAIN_METRIC[task.kind].format(k=max(cfg.evaluate.cutoffs))


def _collect(run: Run, split: str) -> _Collected:
  asked: list[Question] = []
  answers: dict[str, list[np.ndarray]] = {n: [] for n in run.cfg.active_tasks}
  labels: dict[str, list[Labels]] = {n: [] for n in run.cfg.active_tasks}
  seen: dict[str, list[np.ndarray]] = {}
  experts = []
  expected = run.dataset.manifest["snapshots"][split]
  with tqdm(total=expected, desc=f"evaluating {split}", unit=" snapshots", mininterval=1) as bar:
    for batch in batches.questions(run.dataset, run.cfg, split=labels_lib.SPLITS[split]):
      out = run.answer(batch.features)
      n = len(batch.questions)
      asked += batch.questions
      experts.append(np.asarray(out.expert)[:, :n])
      for name in answers:
        answers[name].append(np.asarray(out.answers[name])[:n])
        labels[name].append(batch.labels[name])
      for name, values in batch.seen.items():
        seen.setdefault(name, []).extend(values)
      bar.update(n)
  if not asked:
    raise config.ConfigError(
      f"there is no {split} snapshot to evaluate; see 'snapshots' in {run.dataset.path}/manifest.json."
    )
  return _Collected(
    asked,
    {n: np.concatenate(parts) for n, parts in answers.items()},
    {n: Labels(*(np.concatenate(part) for part in zip(*parts))) for n, parts in labels.items()},
    seen,
    np.concatenate(experts, axis=1),
  )


def _task(
  run: Run, name: str, task: config.Task, collected: _Collected, by_aggregates: np.ndarray | None
) -> dict[str, Any] | None:
  """Metrics and baselines of one task; None without any label."""
  label = collected.labels[name]
  index = np.flatnonzero(label.known)
  if not len(index):
    return None
  value, answer = label.value[index], collected.answers[name][index]
  questions = [collected.questions[i] for i in index]
  if isinstance(task, config.NextEvent):
    return _ranking(run, name, task, value, answer, questions, collected.seen.get(name, []), index)
  score = metrics.multi_label if isinstance(task, config.FutureValues) else metrics.binary
  value = value.astype(np.float32)
  out: dict[str, Any] = {
    "labels": len(index),
    "positive": float(value.mean()),
    "metrics": score(value, _sigmoid(answer)),
  }
  rate = np.array(run.dataset.manifest["label_rates"][name])
  constant = np.broadcast_to(rate if value.ndim == 2 else rate[0], value.shape)
  compared: dict[str, Metrics] = {"constant": score(value, constant)}
  area = "auc" if value.ndim == 1 else "mean_auc"
  compared["constant"][area] = None if out["metrics"][area] is None else 0.5
  if by_aggregates is not None:
    compared["aggregates + logistic"] = score(value, by_aggregates[index])
  return {**out, "baselines": compared}


def _ranking(
  run: Run,
  name: str,
  task: config.NextEvent,
  value: np.ndarray,
  state: np.ndarray,
  questions: list[Question],
  all_seen: list[np.ndarray],
  index: np.ndarray,
) -> dict[str, Any]:
  seen = [all_seen[i] for i in index] if task.exclude_seen else None
  rows, bias = run.catalogue(name)
  size, ranks = 1024, []
  for at in range(0, len(value), size):
    part = slice(at, at + size)
    items = [s[s >= 2] - 2 for s in seen[part]] if seen is not None else None
    ranks.append(
      ranking.target_ranks(state[part], value[part] - 2, items, rows, bias, run.cfg.evaluate.catalogue_chunk)
    )
  cutoffs = run.cfg.evaluate.cutoffs
  compared = {"most popular": metrics.ranking(baselines.popularity_ranks(value, seen), cutoffs)}
  if not task.exclude_seen:
    personal = baselines.personal_ranks(run.dataset, task.field, questions, value)
    compared["own most frequent"] = metrics.ranking(personal, cutoffs)
  return {
    "labels": len(value),
    "unseen_in_training": int(np.sum(value < 2)),
    "metrics": metrics.ranking(np.concatenate(ranks), cutoffs),
    "baselines": compared,
  }


def _sigmoid(logits: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-logits.astype(np.float64)))


def _load(run: Run, name: str, collected: _Collected) -> dict[str, Any]:
  """Where the snapshots' tokens went in each MoE layer, over the labelled (for one yes-or-no: positive) snapshots."""
  label = collected.labels[name]
  chosen = label.known
  if label.value.ndim == 1 and label.value.dtype != np.int32:
    chosen = chosen & (label.value > 0)
  experts = run.cfg.model.experts
  load = [
    (np.bincount(layer[chosen].reshape(-1), minlength=experts) / max(layer[chosen].size, 1)).round(4).tolist()
    for layer in collected.expert
  ]
  return {"snapshots": int(chosen.sum()), "load": load}


def table(result: Mapping[str, Any], split: str = "test") -> list[list[str]]:
  """Rows for people: task, labels, metric, this run, each baseline; the first row is the heading."""
  tasks = result["splits"][split]
  names = list(dict.fromkeys(b for t in tasks.values() for b in t["baselines"]))
  rows = [["task", "labels", "metric", "supermoe", *names]]
  for name, task in tasks.items():
    metric = result["main_metric"][name]
    cells = [_cell(task["metrics"][metric]), *(_cell(task["baselines"].get(b, {}).get(metric)) for b in names)]
    rows.append([name, f"{task['labels']:,}", metric, *cells])
  return rows


def _cell(value: float | None) -> str:
  return "–" if value is None else f"{value:.4f}"


def render(rows: list[list[str]]) -> str:
  """Aligns a table for the terminal."""
  widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
  lines = [
    "  ".join(c.ljust(w) if i in (0, 2) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
    for row in rows
  ]
  return "\n".join([lines[0], "  ".join("─" * w for w in widths), *lines[1:]])
