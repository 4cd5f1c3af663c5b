"""Run directories with what a report reads in them, made without training."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from supermoe_jax import config
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.evaluation import baselines, evaluate, event_experts, intervals
from supermoe_jax.evaluation.breakdown import Answers

HOSTILE = "<b>x</b>"  # a field's name
SPLITS = ("train", "validation", "test")
NOVEMBER = config.parse_time("2017-11-01", "")


TASKS = {
  "churn": {"kind": "future_event", "source": "purchases", "negate": True},
  "basket": {"kind": "future_values", "field": "item", "top": 4},
  "following": {"kind": "next_event", "field": "item"},
  "young": {"kind": "user_label", "column": "age", "positive": ["18-24"]},
}


def make_config(path: pathlib.Path, tasks=TASKS, **model) -> config.Config:
  return config.resolve(
    {
      "data": {
        "path": str(path / "dataset"),
        "sources": {"purchases": {"files": ["p.parquet"]}},
        "fields": {HOSTILE: {"column": "x"}, "item": {}, "price": {"kind": "numeric"}},
        "users": {"files": ["u.parquet"]},
        "split": {"train_end": "2017-10-01", "validation": ["2017-10-01"], "test": ["2017-11-01"]},
        "aggregates": {"enabled": False},
      },
      "tasks": tasks,
      "model": {"d_model": 8, "layers": 2, "heads": 2, "d_hidden": 16, "d_expert": 16, "experts": 4, **model},
      "train": {"steps": 60, "warmup_steps": 5},
    }
  )


def write_json(file: pathlib.Path, value) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(value))


def make_dataset(cfg: config.Config) -> None:
  known = {s: {"known": 40, "positive": 10} for s in SPLITS}
  source = {"rows_read": 1005, "rows_kept": 1000, "dropped": {"null_user": 5}, "items_missing": 2, "users_missing": 4}
  write_json(
    pathlib.Path(cfg.data.path) / "manifest.json",
    {
      "data_hash": cfg.data_hash(),
      "users": 40,
      "events": 1000,
      "log": {"first": "2017-01-01T00:00:00", "last": "2017-12-31T00:00:00", "observed_until": "2017-12-31T00:00:00"},
      "lengths": {"p0": 1.0, "p50": 24.0, "p100": 90.0},
      "reading": {
        "dropped": {"null_user": 5},
        "duplicate_rows": 3,
        "tie_rate": 0.25,
        "nulls": {HOSTILE: 7, "item": 0, "price": 0},
        "sources": {"purchases": source},
      },
      "fields": {
        HOSTILE: {"kind": "vocabulary", "codes": 12, "oov_training": 0.0, "oov_after": 0.125, "colliding": None},
        "item": {"kind": "hash", "codes": 22, "oov_training": 0.0, "oov_after": 0.0, "values": 30, "colliding": 0.4},
      },
      "snapshots": dict.fromkeys(SPLITS, 40),
      "snapshots_with_too_few_events": 6,
      "users_without_training_events": 2,
      "users_without_snapshot": 1,
      "user_table": {"user_rows": 20, "labelled_users_without_events": 0},
      "labels": {
        "churn": known,
        "basket": known,
        "following": {s: {"known": 40, "unseen_value": 1} for s in SPLITS},
        "young": {**known, "test": {"known": 0, "positive": 0}},
      },
      "aggregates": {"mean": [], "scale": []},
      "warnings": ["task young has no label in test & more"],
    },
  )


def make_metrics(cfg: config.Config, workdir: pathlib.Path, steps=(20, 40, 60), **more) -> None:
  load = [[0.1, 0.2, 0.3, 0.4]] if cfg.model.moe_every else []
  rows = [
    {
      "step": s,
      "loss": 10 / s,
      "tasks": {n: {"loss": None if n == "young" and s == 40 else 1 / s, "labels": 9.0} for n in cfg.tasks},
      "balance_loss": 1.1,
      "z_loss": 0.1,
      "load": load,
      "dropped_share": 0.05,
      "gradient_norm": float("nan") if s == 40 else 2.0,
      "learning_rate": 1e-3,
      "speed": {"events_per_second": 12345.6},
      **more,
    }
    for s in steps
  ]
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 80, "lo')  # cut short


def make_validation(workdir: pathlib.Path, steps=(30, 60)) -> None:
  tasks = {"churn": {"auc": 0.7}, "basket": {"mean_auc": None}, "following": {"ndcg@10": 0.125}}
  rows = [{"step": s, "score": s / 100, "tasks": tasks, "speed": {"seconds": 1.0}} for s in steps]
  (workdir / "validation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 90')  # cut short


def make_evaluation(cfg: config.Config, workdir: pathlib.Path, *, whole: bool = True, **changes) -> None:
  """An evaluation, with what lies behind the main metrics or, as they were made once, without."""

  def binary(own, best):
    own, constant, best = ({"auc": v, "log_loss": 0.5} for v in (own, 0.5, best))
    return {"labels": 40, "positive": 0.25, "metrics": own, "baselines": {"constant": constant, "gbdt": best}}

  tasks = {
    "churn": binary(0.8, 0.75),
    "basket": {"labels": 600, "positive": 0.1, "metrics": {"mean_auc": None}, "baselines": {"gbdt": {"mean_auc": 0.6}}},
    "following": {"labels": 600, "metrics": {"ndcg@10": 0.1}, "baselines": {"most popular": {"ndcg@10": 0.15}}},
  }
  load = {n: {"snapshots": 10, "load": [[0.5, 0.25, 0.25, 0.0]] if cfg.model.moe_every else []} for n in tasks}
  result = {
    "step": 60,
    "config_hash": cfg.hash(),
    "main_metric": {"churn": "auc", "basket": "mean_auc", "following": "ndcg@10", "young": "auc"},
    "splits": {"validation": {**tasks, "young": binary(0.55, 0.65)}, "test": tasks},
    "expert_load": {**load, "young": {"snapshots": 0, "load": [[0.0] * 4]}},
  }
  if whole:
    tasks["churn"]["intervals"] = {
      "users": 38,
      "run": [0.7, 0.875],
      "baselines": {"constant": [0.5, 0.5], "gbdt": [0.65, 0.8125]},
      "differences": {
        "constant": {"difference": 0.3, "interval": [0.2, 0.4]},
        "gbdt": {"difference": 0.05, "interval": [0.0125, 0.0875]},
      },
    }
    none = {"users": 40, "run": None, "baselines": {}, "differences": {}}
    tasks["basket"]["intervals"] = {**none, "baselines": {"gbdt": None}, "differences": {"gbdt": None}}
    lead = {"difference": -0.05, "interval": [-0.1, 0.025]}
    tasks["following"]["intervals"] = {**none, "run": [0.05, 0.2], "differences": {"most popular": lead}}
    result |= behind(cfg)
  write_json(workdir / "evaluation.json", {**result, **changes})


def behind(cfg: config.Config) -> dict:
  """What lies behind the main metrics: two lengths of histories, a calibration, and the experts of events."""

  def group(low, high, run, interval):
    other = {"gbdt": {"value": 0.625, "interval": [0.5, 0.75]}}
    scored = {"value": run, "interval": interval}
    return {"from": low, "to": high, "labels": 20, "users": 19, "positive": 0.25, "run": scored, "baselines": other}

  bins = [
    {"labels": 20, "least": 0.0, "most": 0.25, "predicted": 0.125, "observed": 0.25, "interval": [0.125, 0.5]},
    {"labels": 20, "least": 0.25, "most": 1.0, "predicted": 0.5, "observed": 0.75, "interval": [0.5, 0.875]},
  ]
  counted = None
  if cfg.model.moe_every:
    rows = [
      {"name": "<i>milk</i>", "tokens": 600, "choices": [[660, 0, 228, 312]]},
      {"name": "rare", "tokens": 3, "choices": [[0, 6, 0, 0]]},
    ]
    counted = {
      "snapshots": 40,
      "tokens": 1000,
      "overall": [[800, 400, 400, 400]],
      "sources": [{"name": "purchases", "tokens": 1000, "choices": [[800, 400, 400, 400]]}],
      "fields": {"item": rows},
      "unnamed": [HOSTILE],
    }
  return {
    "intervals": "95 % intervals, made up.",
    "by_history": {"churn": [group(4, 15, 0.75, [0.625, 0.8125]), group(16, None, None, None)]},
    "calibration": {"churn": {"pooled": False, "labels": 40, "ece": 0.1875, "bins": bins}},
    "event_experts": counted,
  }


def make_embeddings(cfg: config.Config, workdir: pathlib.Path, users: int = 40) -> None:
  vectors = np.random.default_rng(0).normal(size=(users + 1, 8)).astype(np.float32)
  table = pa.table(
    {
      "user_id": pa.array([*range(users), 0]),
      "as_of": pa.array([NOVEMBER] * users + [NOVEMBER - 1], pa.timestamp("us")),
      "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 8),
      "n_events": pa.array(range(1, users + 2)),
    }
  )
  write_json(
    workdir / "embeddings" / "manifest.json", {"kind": "embeddings", "step": 60, "config_hash": cfg.hash(), "parts": 1}
  )
  pq.write_table(table, workdir / "embeddings" / "part-00000.parquet")


# ------------------------------------------------------------------------- a run of a prepared dataset, but not trained


def make_whole(cfg: config.Config, dataset: Dataset, workdir: pathlib.Path, time: int) -> None:
  """What a run over a prepared dataset leaves, with drawn answers, routings and embeddings in place of a model's."""
  random = np.random.default_rng(0)
  workdir.mkdir()
  config.save(cfg, workdir / "config.json")
  make_metrics(cfg, workdir)
  answers = {n: _answers(t, random) for n, t in cfg.active_views.items()}
  main = {n: evaluate.main_metric(cfg, t) for n, t in cfg.active_views.items()}
  scored = {n: _scored(a, main[n]) for n, a in answers.items()}
  experts = cfg.model.experts
  load = [random.dirichlet(np.ones(experts)).tolist()]
  result = {
    "step": cfg.train.steps,
    "config_hash": cfg.hash(),
    "main_metric": main,
    "splits": {"validation": scored, "test": scored},
    "expert_load": {n: {"snapshots": 20, "load": load} for n in answers},
    "intervals": intervals.METHOD,
    "by_history": {n: a.by_history() for n, a in answers.items()},
    "calibration": {n: c for n, a in answers.items() if (c := a.calibration()) is not None},
    "event_experts": {"snapshots": 20, "tokens": 5000, **_routed(dataset, experts, random)},
  }
  write_json(workdir / "evaluation.json", result)
  users = [int(dataset[i]["user"]) for i in range(len(dataset))]
  write_vectors(workdir / "embeddings", random.normal(size=(len(users), 8)).astype(np.float32), users, time, cfg.hash())


def _answers(task: config.LabelledTask, random: np.random.Generator, n: int = 300) -> Answers:
  form = config.answer(task)
  user, events = random.integers(0, 40, n), random.integers(1, 60, n)
  if form == "catalogue":
    ranks = [random.integers(1, 12, n).astype(np.float64) for _ in range(3)]
    return Answers(
      form, ranks[0], ranks[0], {"most popular": ranks[1], "own most frequent": ranks[2]}, user, events, 10
    )
  shape = (n, task.top) if isinstance(task, config.FutureValues) else (n,)
  value = (random.random(shape) < 0.3).astype(np.float32)
  own, other = (1 / (1 + np.exp(1 - k * value - random.normal(size=shape))) for k in (1.5, 1.0))
  compared = {"constant": np.full(shape, 0.3), baselines.on_aggregates(form): other}
  return Answers(form, value, own, compared, user, events, 10)


def _scored(answers: Answers, metric: str) -> dict:
  def value(answer: np.ndarray) -> dict:
    found = intervals.influence(intervals.Scored(answers.form, answers.value, answer, answers.cutoff))
    return {metric: found.value if found else None}

  compared = {b: value(a) for b, a in answers.baselines.items()}
  found = {"labels": len(answers.value), "metrics": value(answers.run), "baselines": compared}
  return {**found, "intervals": answers.with_intervals()}


def _routed(dataset: Dataset, experts: int, random: np.random.Generator, n: int = 5000) -> dict:
  schema = dataset.schema
  sizes = [*schema.categorical.values(), *(schema.categorical[f] for f in schema.further)]
  codes = np.stack([random.integers(0, size, n) for size in sizes], axis=1)
  expert = (codes[:, :1] + random.integers(0, 2, (n, 2))) % experts
  return event_experts.tally(dataset, random.integers(1, len(schema.sources) + 1, n), codes, expert[None], experts)


def write_vectors(
  folder: pathlib.Path, vectors: np.ndarray, users: list[int], time: int, config_hash: str, rows: tuple[int, ...] = ()
) -> None:
  """Embeddings of users at a time, in parts of so many rows and the rest, and an earlier one of the second user."""
  folder.mkdir(parents=True)
  vectors = np.concatenate([vectors, vectors[:1]])
  table = pa.table(
    {
      "user_id": pa.array([*users, users[1]]),
      "as_of": pa.array([time] * len(users) + [time - 1], pa.timestamp("us")),
      "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1]),
      "n_events": pa.array(range(len(users) + 1)),
    }
  )
  ends = [*np.cumsum(rows, dtype=int).tolist(), len(table)]
  for i, (start, end) in enumerate(zip([0, *ends], ends)):
    pq.write_table(table.slice(start, end - start), folder / f"part-{i:05d}.parquet")
  manifest = {"kind": "embeddings", "step": 12, "parts": len(ends), "config_hash": config_hash}
  write_json(folder / "manifest.json", manifest)
