"""Evaluates a run: measures every task on validation and test snapshots, and compares it with baselines."""

from __future__ import annotations

import json
import time as clock
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from supermoe_jax import atomic_files, config
from supermoe_jax.data.dataset import snapshot_batches
from supermoe_jax.data.dataset.snapshot_batches import Query, QueryBatch
from supermoe_jax.data.encoding.splits import SPLITS
from supermoe_jax.data.tasks.labels import Labels, right_values
from supermoe_jax.errors import ConfigError, RunError
from supermoe_jax.evaluation import baselines, event_experts, influence, metrics, ranking, survival
from supermoe_jax.evaluation.answer_forms import SurvivalMetrics, form_of
from supermoe_jax.evaluation.breakdown import ScoredAnswers
from supermoe_jax.evaluation.ranking_baselines import RankingBaselines
from supermoe_jax.progress import ProgressBar
from supermoe_jax.training.run import Run

EVALUATED_SPLITS = ("validation", "test")


class _Collected(NamedTuple):
  """All questions of a split with the model's answers, as host arrays in the order of the questions.

  Attributes:
    questions: the n questions.
    answers: the answers for each task, `[n, …]`, as in `Answered`.
    labels: the labels of each task, `[n, …]`.
    seen: for each task that excludes seen values, the codes seen before each question.
    also: for each next-event task, int32 `[n, A]`, codes that are as right as the label.
    ranks: for each next-event task, float `[n]`, the rank of each question's best right value, see `target_ranks`.
    expert: int32 `[M, n, K]`, the experts of the snapshots' own tokens.
    task_expert: int32 `[M, n, T, K]`, the experts of the tasks' tokens; None without such tokens.
    gate: float32 `[n, T, E]`, the tasks' gates over experts; None without gates.
  """

  questions: list[Query]
  answers: dict[str, np.ndarray]
  labels: dict[str, Labels]
  seen: dict[str, list[np.ndarray]]
  also: dict[str, np.ndarray]
  ranks: dict[str, np.ndarray]
  expert: np.ndarray
  task_expert: np.ndarray | None
  gate: np.ndarray | None


class _TaskAnswers(NamedTuple):
  """The n known labels of one task with the model's answers; `question [n]` is the index of each label's question."""

  value: np.ndarray
  answer: np.ndarray
  question: np.ndarray


def evaluate(
  run: Run,
  *,
  compare: bool = True,
  progress: bool = True,
  splits: Sequence[str] = EVALUATED_SPLITS,
  write: bool = True,
  asked: Mapping[str, Sequence[QueryBatch]] | None = None,
  most: int = 0,
) -> dict[str, Any]:
  """Measures every active task that has labels and returns the content of `evaluation.json`.

  Args:
    run: the run to evaluate.
    compare: whether to measure the baselines too; on a small dataset they take longer than the model.
    progress: whether to show a bar.
    splits: the splits to evaluate; the expert load is measured on the last one.
    write: whether to write the file into the run directory, for which `splits` must name both splits. The result then
      also holds the main metrics' intervals and, for test, the metrics by length of the history, the calibration,
      amounts by deciles, and the experts of events.
    asked: the questions of each split, if they are made already; they must be the questions of the run's config.
    most: the number of snapshots of a split to evaluate, drawn by the run's seed; 0: all of them.

  Raises:
    ConfigError: a split that the config names has no snapshot, or the config names neither split.
    RunError: answers of the run are not finite numbers.
    ValueError: the file is to be written, but `splits` does not name both splits.
  """
  if write and set(splits) != set(EVALUATED_SPLITS):
    raise ValueError(
      f"evaluation.json holds {' and '.join(EVALUATED_SPLITS)}, not only {', '.join(splits)}; pass write=False"
    )
  if not any(run.cfg.data.split.has_snapshots(split) for split in splits):
    raise ConfigError(
      f"there is nothing to evaluate: config.data.split names no snapshot for {' or '.join(splits)}. Name a time there "
      "and prepare and train again; 'supermoe embed' and 'supermoe probe' need none."
    )
  begun = clock.monotonic()
  tasks = run.cfg.active_views
  aggregates = baselines.AggregateModels(run.dataset, run.cfg) if compare else None
  rankings = RankingBaselines(run.dataset, run.cfg) if compare else None
  measured: dict[str, dict[str, Any]] = {}
  load: dict[str, Any] = {}
  answers: dict[str, ScoredAnswers] = {}
  for split in sorted(splits, key=EVALUATED_SPLITS.index):  # the last is the one that the details are about
    if not run.cfg.data.split.has_snapshots(split):
      measured[split] = {}
      continue
    expected = run.dataset.manifest["snapshots"][split]
    if asked is not None:
      questions: Iterable[QueryBatch] = asked[split]
    else:
      questions = snapshot_batches.query_batches(run.dataset, run.cfg, split=SPLITS[split], most=most)
    collected = _collect(run, split, questions, min(expected, most or expected) if progress else None)
    by_aggregates = aggregates.predictions(collected.questions) if aggregates else {}
    found = {n: _task(run, n, t, collected, split, rankings, by_aggregates.get(n, {})) for n, t in tasks.items()}
    for name, models in aggregates.fitted.items() if aggregates else ():
      if (measures := found[name]) is not None:
        measures[0]["fitted"] = {baseline: model.described() for baseline, model in models.items()}
    answers = {n: v[1] for n, v in found.items() if v is not None}
    measured[split] = {n: v[0] for n, v in found.items() if v is not None}
    if write:
      for name, given in answers.items():
        measured[split][name]["intervals"] = given.with_intervals()
    load = {n: _load(run, n, t, i, collected) for i, (n, t) in enumerate(tasks.items())}
  tested = run.cfg.data.split.has_snapshots("test")
  if write and not tested:  # the details of evaluation.json are about test
    answers, load = {}, {}
  result: dict[str, Any] = {
    "step": run.step,
    "config_hash": run.cfg.hash(),
    "main_metric": {n: main_metric(run.cfg, t) for n, t in tasks.items()},
    "splits": measured,
    "expert_load": load,
  }
  if write:
    result |= {
      "intervals": influence.METHOD,
      "by_history": {n: a.by_history() for n, a in answers.items()},
      "calibration": {n: c for n, a in answers.items() if (c := a.calibration()) is not None},
      "deciles": {n: d for n, a in answers.items() if (d := a.deciles()) is not None},
      "event_experts": event_experts.count_experts(run, progress=progress) if tested else None,
    }
  result["seconds"] = round(clock.monotonic() - begun, 1)
  if write:
    atomic_files.write_file(run.workdir / "evaluation.json", json.dumps(result, indent=1) + "\n")
  return result


def main_metric(cfg: config.Config, task: config.LabelledTask) -> str:
  """Returns the name of a task's main metric."""
  return form_of(task).main_metric(cfg.evaluate.cutoffs)


def metric_names(cfg: config.Config, task: config.LabelledTask) -> list[str]:
  """Returns the names of all metrics of a task."""
  return form_of(task).metric_names(cfg.evaluate.cutoffs)


def _collect(run: Run, split: str, questions: Iterable[QueryBatch], expected: int | None) -> _Collected:
  """Asks the model the questions of a split; shows a bar up to the number `expected`, unless that is None.

  Raises:
    ConfigError: there is no question.
  """
  asked: list[Query] = []
  tasks = run.cfg.active_views
  answers: dict[str, list[np.ndarray]] = {n: [] for n in tasks}
  labels: dict[str, list[Labels]] = {n: [] for n in tasks}
  seen: dict[str, list[np.ndarray]] = {}
  also: dict[str, list[np.ndarray]] = {}
  expert: list[np.ndarray] = []
  task_expert: list[np.ndarray] = []
  gate: list[np.ndarray] = []
  rankers = {n: ranking.QuestionRanks(run, n) for n, t in tasks.items() if t.answer == "catalogue"}
  bar = ProgressBar(
    total=expected, desc=f"evaluating {split}", unit=" snapshots", mininterval=1, disable=expected is None, leave=None
  )
  with bar:
    for batch in questions:
      out = run.answer(batch.features, batch.given)
      n = len(batch.questions)
      asked += batch.questions
      expert.append(np.asarray(out.expert)[:, :n])
      if out.task_expert is not None:
        task_expert.append(np.asarray(out.task_expert)[:, :n])
      if out.gate is not None:
        gate.append(np.asarray(out.gate)[:n])
      for name in tasks:
        answers[name].append(np.asarray(out.answers[name])[:n])
        labels[name].append(batch.labels[name])
      for name, values in batch.seen.items():
        seen.setdefault(name, []).extend(values)
      for name, codes in batch.also.items():
        also.setdefault(name, []).append(codes)
      for name, ranker in rankers.items():
        right = right_values(batch.labels[name], batch.also[name])
        ranker.add(answers[name][-1], right, batch.seen.get(name), out.remembered.get(name, ()))
      bar.update(n)
  if not asked:
    raise ConfigError(f"there is no {split} snapshot to evaluate; see 'snapshots' in {run.dataset.path}/manifest.json.")
  return _Collected(
    asked,
    {n: np.concatenate(parts) for n, parts in answers.items()},
    {n: Labels(*(np.concatenate(part) for part in zip(*parts))) for n, parts in labels.items()},
    seen,
    {n: np.concatenate(parts) for n, parts in also.items()},
    {n: ranker.ranks() for n, ranker in rankers.items()},
    np.concatenate(expert, axis=1),
    np.concatenate(task_expert, axis=1) if task_expert else None,
    np.concatenate(gate) if gate else None,
  )


def _task(
  run: Run,
  name: str,
  task: config.LabelledTask,
  collected: _Collected,
  split: str,
  rankings: RankingBaselines | None,
  by_aggregates: Mapping[str, np.ndarray],
) -> tuple[dict[str, Any], ScoredAnswers] | None:
  """Returns the metrics and baselines of one task, and the answers that they measure; None without a known label."""
  label = collected.labels[name]
  known = np.nonzero(label.known)  # if a question asks about several events, each event is an answer of its own
  if not len(known[0]):
    return None
  asked = _TaskAnswers(label.value[known], collected.answers[name][known], known[0])
  if bad := np.count_nonzero(~np.isfinite(asked.answer).reshape(len(asked.answer), -1).all(axis=1)):
    raise RunError(
      f"{run.workdir}, step {run.step}: {bad} of {len(asked.answer)} answers of task {name} are not finite numbers, so "
      "the checkpoint cannot be measured; evaluate an earlier one with --checkpoint."
    )
  if task.answer == "catalogue":
    return _ranking(run, name, cast(config.NextEvent, task), asked, collected, split, rankings)
  users = np.array([q.user for q in collected.questions])[asked.question]
  form, measured = task.answer, form_of(task)
  predicted = measured.predictions(asked.answer)
  out: dict[str, Any] = {"labels": len(asked.value)}
  if form in ("binary", "multilabel"):
    out["positive"] = float(asked.value.mean())
  elif form == "multiclass":
    out["classes"] = len(np.unique(asked.value))
  elif form == "amount":
    out["mean"], out["zero"] = float(asked.value.mean()), float(np.mean(asked.value == 0))
  elif isinstance(measured, SurvivalMetrics):
    out["observed"] = float(asked.value[:, 1].mean())
    out["by_day"] = survival.calibration_by_day(asked.value, predicted, measured.edges)
  out["metrics"] = measured.measure(asked.value, predicted, users)
  others: dict[str, np.ndarray] = {}
  if rankings is not None:
    rates = run.dataset.manifest["label_rates"].get(name)
    others["constant"] = baselines.constant(task, rates, predicted.shape)
    if form == "amount":
      others["last window"] = baselines.last_window(
        run.dataset, run.cfg, name, [collected.questions[i] for i in asked.question]
      )
    if form == "survival":
      others["own gap"] = baselines.own_gaps(
        run.dataset, run.cfg, name, [collected.questions[i] for i in asked.question]
      )
  others |= {baseline: answers[asked.question] for baseline, answers in by_aggregates.items()}
  out["baselines"] = {b: measured.measure(asked.value, answer, users) for b, answer in others.items()}
  scores = {b: measured.scores(answer) for b, answer in others.items()}
  return out, _answers(run, form, asked, measured.scores(predicted), scores, collected)


def _answers(
  run: Run,
  form: config.Answer,
  asked: _TaskAnswers,
  own: np.ndarray,
  others: Mapping[str, np.ndarray],
  collected: _Collected,
) -> ScoredAnswers:
  questions = [collected.questions[i] for i in asked.question]
  user, events = (np.array([getattr(q, k) for q in questions]) for k in ("user", "n_events"))
  return ScoredAnswers(form, asked.value, own, others, user, events, max(run.cfg.evaluate.cutoffs))


def _ranking(
  run: Run,
  name: str,
  task: config.NextEvent,
  asked: _TaskAnswers,
  collected: _Collected,
  split: str,
  rankings: RankingBaselines | None,
) -> tuple[dict[str, Any], ScoredAnswers]:
  value = asked.value
  right = right_values(collected.labels[name], collected.also[name])[asked.question]
  seen = [collected.seen[name][i] for i in asked.question] if task.exclude_seen else None
  cutoffs = run.cfg.evaluate.cutoffs
  others: dict[str, np.ndarray] = {}
  if rankings is not None:
    questions = [collected.questions[i] for i in asked.question]
    others = rankings.ranks(name, task, split, questions, right, seen)
  own = collected.ranks[name][asked.question]
  out = {
    "labels": len(value),
    "values": run.dataset.schema.outputs[name],
    "unseen_in_training": int(np.sum((right < 2).all(axis=1))),
    "metrics": metrics.ranking_metrics(own, cutoffs),
    "baselines": {b: metrics.ranking_metrics(rank, cutoffs) for b, rank in others.items()},
  }
  if rankings is not None:
    out |= rankings.described(name)
  if task.memory:
    gains = asked.answer[:, -len(task.memory) :]
    out["memory"] = {kind: {"gain": float(g.mean()), "spread": float(g.std())} for kind, g in zip(task.memory, gains.T)}
  if right.shape[1] > 1:
    out["right_values"] = float(np.mean((right > 0).sum(axis=1)))  # mean number of right values of a question
    out["full_moments"] = float(np.mean((right > 0).all(axis=1)))  # share of questions that `most_values` may have cut
  return out, _answers(run, "catalogue", asked, own, others, collected)


def _load(run: Run, name: str, task: config.LabelledTask, view: int, collected: _Collected) -> dict[str, Any]:
  """Returns each expert's share of a task's tokens in each MoE layer, over snapshots with a (binary: positive) label.

  Without task tokens the snapshots' own tokens are counted. If the task has a gate (its view is the `view`-th), the
  result also holds the gate's mean over the same snapshots.
  """
  label = collected.labels[name]
  chosen = label.known
  if task.answer == "binary":
    chosen = chosen & (label.value > 0)
  if chosen.ndim == 2:  # several events a snapshot
    chosen = np.any(chosen, axis=1)
  tokens = collected.expert if collected.task_expert is None else collected.task_expert[:, :, view]
  experts = run.cfg.model.experts
  out: dict[str, Any] = {
    "snapshots": int(chosen.sum()),
    "load": [
      (np.bincount(layer[chosen].reshape(-1), minlength=experts) / max(layer[chosen].size, 1)).round(4).tolist()
      for layer in tokens
    ],
  }
  if collected.gate is not None:
    gate = collected.gate[chosen, view]
    out["gate"] = (gate.sum(axis=0) / max(len(gate), 1)).astype(np.float64).round(4).tolist()
  return out
