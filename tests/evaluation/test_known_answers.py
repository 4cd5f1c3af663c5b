"""Evaluation of every kind of task, of a model whose answers are known."""

from __future__ import annotations

import json
import pathlib
import types
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sk

from supermoe_jax import config, device_mesh
from supermoe_jax.data.dataset import snapshot_batches
from supermoe_jax.data.dataset.snapshot_batches import Query, QueryBatch
from supermoe_jax.data.encoding.histories import UserBlock, UserHistory, end_to_end
from supermoe_jax.data.encoding.splits import TEST, TRAIN, VALIDATION
from supermoe_jax.data.tasks.labels import Labels
from supermoe_jax.errors import ConfigError
from supermoe_jax.evaluation import baselines, evaluate, event_experts, metrics, ranking, results_table
from supermoe_jax.evaluation.ranking import target_ranks
from supermoe_jax.layers.catalogue import Catalogue

USERS, PER_SNAPSHOT, ITEMS, CLASSES, EXPERTS, ROWS = 60, 3, 9, 3, 4, 16
TRAIN_RATES = {
  "click": [0.3],
  "dwell": [0.0],
  "quiet": [0.4],
  "pages": [0.2, 0.5],
  "plan": [0.5, 0.3, 0.2],
  "age": [0.25],
}


def make_config(exclude_seen: bool = False, **model) -> config.Config:
  return config.resolve(
    {
      "data": {
        "path": "nowhere",
        "sources": {"visits": {"files": ["v.parquet"]}},
        "fields": {"page": {}, "clicked": {"input": False}, "dwell": {"kind": "numeric", "input": False}},
        "users": {"files": ["u.parquet"]},
        "split": {"train_end": "2024-05-01", "validation": ["2024-05-02"], "test": ["2024-05-20"]},
      },
      "tasks": {
        "left_out": {"kind": "future_event", "source": "visits"},
        "next_page": {"kind": "next_event", "field": "page", "exclude_seen": exclude_seen},
        "click": {"kind": "event_label", "field": "clicked", "positive": ["1"], "given": ["page"], "per_snapshot": 3},
        "alike": {"kind": "contrast"},
        "dwell": {"kind": "event_label", "field": "dwell", "per_snapshot": 3},
        "quiet": {"kind": "future_event", "source": "visits", "negate": True},
        "pages": {"kind": "future_values", "field": "page", "top": 2},
        "plan": {"kind": "user_label", "column": "plan", "type": "multiclass", "sample_space": "quiet == 1"},
        "age": {"kind": "user_label", "column": "age", "type": "regression"},
      },
      "exclude_tasks": ["left_out"],
      "model": {"experts": EXPERTS, "experts_per_token": 2, **model},
      "evaluate": {"batch_rows": ROWS, "cutoffs": [2, 5]},
    }
  )


class FakeDataset:
  """Users whose labels at their training snapshots follow from their number's binary digits, their aggregates.

  One of validation has other labels.
  """

  path = pathlib.Path("nowhere")
  encoders = None
  tie_rate = 0.0
  schema = types.SimpleNamespace(
    aggregates=6,
    value_counts={},
    outputs={"pages": 2, "plan": CLASSES, "age": 1, "quiet": 1, "next_page": ITEMS},
    categorical={"page": ITEMS + 2},
    field={"page": 0}.get,
  )

  def __init__(self) -> None:
    self.manifest = {"snapshots": {"validation": USERS, "test": USERS}, "label_rates": TRAIN_RATES}

  def __len__(self) -> int:
    return USERS

  def __getitem__(self, user: int) -> dict:
    digits = self.digits(user)
    pages, plan, age = digits[:2], digits[0] + digits[1], digits[2] - 2 * digits[3]
    label = {
      "quiet": [digits[0], digits[0], 1 - digits[0]],
      "pages": [1 - pages, pages, 1 - pages],  # of several values the last training snapshot counts
      "plan": [2 - plan, plan, 2 - plan],  # of the table of users the last one counts too
      "age": [age, -age, -age],  # known at the first snapshot alone
    }
    record = {
      "number": user,
      "codes": np.array([[2], [2 + user % ITEMS], [2 + (user + 1) % ITEMS]]),
      "snapshot_split": np.array([TRAIN, TRAIN, VALIDATION]),
    }
    record |= {"snapshot_time": np.array([3, 5, 9]), "snapshot_events": np.array([1, 2, 3])}
    for name, value in label.items():
      record |= {f"label_{name}": np.array(value), f"known_{name}": np.array([1, name != "age", 1])}
    return record

  @staticmethod
  def digits(user: int) -> np.ndarray:
    return (user >> np.arange(6)) & 1

  def history(self, record: dict) -> UserHistory:
    none = np.zeros((3, 0), np.float32)
    return UserHistory(str(record["number"]), np.arange(3), np.zeros(3, np.int32), record["codes"], none, 2)

  def histories(self, users: np.ndarray) -> UserBlock:
    return end_to_end([self.history(self[int(u)]) for u in users])

  def aggregates(self, block: UserBlock, user: np.ndarray, time: np.ndarray, n_events: np.ndarray) -> np.ndarray:
    assert set(zip(time.tolist(), n_events.tolist())) <= {(3, 1), (5, 2)}
    return np.array([self.digits(int(block.users[u])) for u in user], np.float64)


class FakeRun:
  """A run that answers a batch, known by its number in place of features, as was drawn for it."""

  def __init__(self, workdir: pathlib.Path, cfg: config.Config, *, tokens: bool = False, gate: bool = False):
    self.workdir, self.cfg, self.dataset, self.step = workdir, cfg, FakeDataset(), 7
    rng = np.random.default_rng(0)
    tasks = cfg.active_views
    n, t, m = USERS, len(tasks), PER_SNAPSHOT
    shape = {"next_page": (n,), "click": (n, m), "dwell": (n, m), "pages": (n, 2)}
    value = {name: (rng.random(shape.get(name, (n,))) < 0.4).astype(np.float32) for name in tasks}
    value["next_page"] = rng.integers(1, ITEMS + 2, n).astype(np.int32)
    value["plan"] = rng.integers(0, CLASSES, n).astype(np.int32)
    value |= {name: rng.normal(size=value[name].shape).astype(np.float32) for name in ("dwell", "age")}
    known = {name: rng.random(v.shape[:1] if name == "pages" else v.shape) < 0.7 for name, v in value.items()}
    for name in ("click", "dwell", "age"):
      value[name][~known[name]] = np.nan
    self.labels = {name: Labels(value[name], known[name]) for name in tasks}
    sizes = {"next_page": (n, 4), "click": (n, m), "dwell": (n, m), "pages": (n, 2), "plan": (n, CLASSES)}
    self.answers = {name: rng.normal(size=sizes.get(name, (n,))).astype(np.float32) for name in tasks}
    self.given = {name: rng.integers(0, 9, (n, m, 1)).astype(np.int32) for name in ("click", "dwell")}
    self.also = rng.integers(0, ITEMS + 2, (n, 2)).astype(np.int32) * (rng.random((n, 2)) < 0.4)
    self.seen = [np.unique(rng.integers(0, ITEMS + 2, rng.integers(0, 5))) for _ in range(n)]
    self.expert = rng.integers(0, EXPERTS, (2, n, 2)).astype(np.int32)
    self.task_expert = rng.integers(0, EXPERTS, (2, n, t, 2)).astype(np.int32) if tokens else None
    self.gate = rng.dirichlet(np.ones(EXPERTS), (n, t)).astype(np.float32) if gate else None
    self.mesh = device_mesh.make_mesh(config.Mesh())
    self.items = Catalogue.of(rng.normal(size=(ITEMS, 4)).astype(np.float32))

  def questions(self, dataset, cfg, *, split: int, most: int) -> Iterator[QueryBatch]:
    assert split in (VALIDATION, TEST)
    for start in range(0, USERS, ROWS):
      part = slice(start, min(start + ROWS, USERS))
      # Two snapshots a user, so that events of several snapshots are one user's.
      asked = [Query(i // 2, str(i // 2), 0, 5, 2, 3) for i in range(part.start, part.stop)]
      labels = {n: Labels(v.value[part], v.known[part]) for n, v in self.labels.items()}
      seen = {"next_page": self.seen[part]} if cfg.tasks["next_page"].exclude_seen else {}
      also = {"next_page": self.also[part]}
      yield QueryBatch(start, asked, labels, seen, {n: self.padded(g, start) for n, g in self.given.items()}, also)

  @staticmethod
  def padded(x: np.ndarray, start: int, axis: int = 0) -> np.ndarray:
    part = x.take(range(start, min(start + ROWS, USERS)), axis=axis)
    return np.pad(part, [(0, ROWS - part.shape[axis]) if i == axis else (0, 0) for i in range(x.ndim)])

  def answer(self, features: int, given: dict[str, np.ndarray]):
    for name, codes in given.items():
      assert np.array_equal(codes, self.padded(self.given[name], features))
    return types.SimpleNamespace(
      answers={n: jnp.asarray(self.padded(a, features)) for n, a in self.answers.items()},
      expert=self.padded(self.expert, features, 1),
      task_expert=None if self.task_expert is None else self.padded(self.task_expert, features, 1),
      gate=None if self.gate is None else self.padded(self.gate, features),
      remembered={},
    )

  def catalogue(self, task: str):
    assert task == "next_page"
    return self.items

  def known(self, task: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, answers and users of a task's known labels."""
    at = np.nonzero(self.labels[task].known)
    return self.labels[task].value[at], self.answers[task][at].astype(np.float64), at[0] // 2


@pytest.fixture
def make_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
  def make(**options) -> FakeRun:
    model = (
      {"conditioning": "token"} if options.get("tokens") else {"conditioning": "mmoe"} if options.get("gate") else {}
    )
    run = FakeRun(tmp_path, make_config(options.pop("exclude_seen", False), **model), **options)
    monkeypatch.setattr(snapshot_batches, "query_batches", run.questions)
    monkeypatch.setattr(event_experts, "count_experts", lambda run, progress: None)  # events have no routing here
    return run

  return make


def sigmoid(x: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-x))


def test_every_kind_has_the_metrics_of_its_form(make_run) -> None:
  run = make_run()
  result = evaluate.evaluate(run, progress=False)
  assert result["main_metric"] == {
    "next_page": "ndcg@5",
    "click": "auc",
    "dwell": "rmse",
    "quiet": "auc",
    "pages": "mean_auc",
    "plan": "auc",
    "age": "rmse",
  }
  assert result == json.loads((run.workdir / "evaluation.json").read_text())
  assert list(result["splits"]) == ["validation", "test"]
  tasks = result["splits"]["test"]
  assert list(tasks) == list(run.cfg.active_views) == list(result["expert_load"])
  for name, task in tasks.items():
    value, answer, _ = run.known(name)
    found = task["metrics"]
    assert task["labels"] == len(value)
    if name == "next_page":
      right = np.concatenate([value[:, None], run.also[run.labels[name].known]], axis=1)
      rank = target_ranks(answer.astype(np.float32), right - 2, None, run.items, 4)
      assert found["hr@5"] == pytest.approx(np.mean(rank <= 5))
      assert task["unseen_in_training"] == np.sum((right < 2).all(axis=1)) > 0
      assert task["right_values"] == pytest.approx(np.mean((right > 0).sum(axis=1)))
      assert task["full_moments"] == pytest.approx(np.mean((right > 0).all(axis=1)))
    elif name in ("dwell", "age"):
      assert found["rmse"] == pytest.approx(sk.root_mean_squared_error(value, answer))
      assert "positive" not in task
    elif name == "plan":
      assert found["accuracy"] == pytest.approx(np.mean(answer.argmax(axis=1) == value))
      odds = np.exp(answer)
      assert found["log_loss"] == pytest.approx(sk.log_loss(value, odds / odds.sum(axis=1, keepdims=True)))
      assert task["classes"] == CLASSES
    elif name == "pages":
      assert found["mean_auc"] == pytest.approx(sk.roc_auc_score(value, answer))
    else:
      assert found["auc"] == pytest.approx(sk.roc_auc_score(value, answer))
      assert found["log_loss"] == pytest.approx(sk.log_loss(value, sigmoid(answer)))
      assert task["positive"] == pytest.approx(value.mean())


def test_a_value_seen_before_is_neither_recommended_nor_counted_as_better(make_run, monkeypatch) -> None:
  """Of several values that are right, the best one is ranked without the others."""
  monkeypatch.setattr(ranking, "RANKED_AT_ONCE", 24)  # so that it takes several parts
  run = make_run(exclude_seen=True)
  task = evaluate.evaluate(run, progress=False, write=False)["splits"]["test"]["next_page"]
  label, rows = run.labels["next_page"], np.asarray(run.items.rows).reshape(-1, 4)[2 : 2 + ITEMS]
  rank, popular = [], []
  for i in np.flatnonzero(label.known):
    codes, seen = {int(label.value[i]), *run.also[i].tolist()}, set(run.seen[i].tolist())
    right, scores = {c for c in codes if c >= 2} - seen, rows @ run.answers["next_page"][i]
    others = set(range(2, ITEMS + 2)) - seen - right
    best = max((scores[c - 2] for c in right), default=None)
    rank.append(np.inf if best is None else 1 + sum(scores[c - 2] > best for c in others))
    popular.append(np.inf if best is None else 1 + sum(c < min(right) for c in others))
  assert task["unseen_in_training"] == np.sum((label.value[label.known] < 2) & (run.also[label.known] < 2).all(axis=1))
  assert task["metrics"] == pytest.approx(metrics.ranking_metrics(np.array(rank), (2, 5)))
  assert list(task["baselines"]) == ["most popular", "popular lately", "co-occurrence"]
  assert task["baselines"]["most popular"] == pytest.approx(metrics.ranking_metrics(np.array(popular), (2, 5)))


def test_gauc_is_of_the_users_of_the_questions(make_run) -> None:
  run = make_run()
  found = evaluate.evaluate(run, progress=False)["splits"]["test"]["click"]["metrics"]
  value, answer, user = run.known("click")
  own = {u: (value[user == u], answer[user == u]) for u in np.unique(user)}
  areas = {u: sk.roc_auc_score(*pair) for u, pair in own.items() if 0 < pair[0].mean() < 1}
  assert found["gauc_users"] == len(areas) > 5
  assert found["gauc"] == pytest.approx(np.average(list(areas.values()), weights=[len(own[u][0]) for u in areas]))
  assert "gauc" not in evaluate.evaluate(run, progress=False)["splits"]["test"]["quiet"]["metrics"]


def test_each_kind_is_compared_with_its_baselines(make_run) -> None:
  run = make_run()
  tasks = evaluate.evaluate(run, progress=False)["splits"]["test"]
  assert {n: list(t["baselines"]) for n, t in tasks.items()} == {
    "next_page": ["most popular", "own most frequent", "own most recent", "popular lately", "co-occurrence"],
    "click": ["constant"],
    "dwell": ["constant"],
    "quiet": ["constant", "aggregates + logistic", "aggregates + boosted trees"],
    "pages": ["constant", "aggregates + logistic"],
    "plan": ["constant", "aggregates + logistic"],
    "age": ["constant", "aggregates + ridge"],
  }
  constant = {n: t["baselines"]["constant"] for n, t in tasks.items() if n != "next_page"}
  for name in ("click", "quiet", "pages", "plan"):
    assert constant[name]["mean_auc" if name == "pages" else "auc"] == 0.5
  assert constant["click"]["gauc"] == 0.5
  value = run.known("plan")[0]
  assert constant["plan"]["log_loss"] == pytest.approx(-np.mean(np.log(np.array(TRAIN_RATES["plan"])[value])))
  assert constant["age"]["rmse"] == pytest.approx(np.sqrt(np.mean((run.known("age")[0] - 0.25) ** 2)))


def test_models_on_aggregates_answer_the_questions_whose_labels_are_known(make_run) -> None:
  run = make_run()
  tasks = evaluate.evaluate(run, progress=False, write=False)["splits"]["test"]
  every = [q for b in run.questions(None, run.cfg, split=TEST, most=0) for q in b.questions]
  answers = baselines.AggregateModels(run.dataset, run.cfg).predictions(every)
  for name, metric in {"quiet": "auc", "age": "rmse"}.items():
    measured = sk.roc_auc_score if metric == "auc" else sk.root_mean_squared_error
    assert len(answers[name]) == (2 if metric == "auc" else 1)
    for baseline, answer in answers[name].items():
      own = answer[run.labels[name].known]
      assert tasks[name]["baselines"][baseline][metric] == pytest.approx(measured(run.known(name)[0], own))


def test_without_comparison_or_writing_only_the_metrics_are_made(make_run) -> None:
  run = make_run()
  whole = evaluate.evaluate(run, progress=False)
  (run.workdir / "evaluation.json").unlink()
  part = evaluate.evaluate(run, compare=False, progress=False, splits=("validation",), write=False)
  assert list(run.workdir.iterdir()) == []
  assert list(part["splits"]) == ["validation"]
  for name, task in part["splits"]["validation"].items():
    assert task["baselines"] == {}
    assert task["metrics"] == whole["splits"]["validation"][name]["metrics"]
  with pytest.raises(ValueError, match="write=False"):
    evaluate.evaluate(run, splits=("test",))


@pytest.mark.parametrize("tokens", [False, True])
def test_load_is_that_of_the_tasks_own_tokens_if_there_are_any(make_run, tokens: bool) -> None:
  run = make_run(tokens=tokens)
  loads = evaluate.evaluate(run, compare=False, progress=False)["expert_load"]
  for view, name in enumerate(run.cfg.active_views):
    value, known = run.labels[name]
    if name in ("click", "quiet"):
      known = known & (value > 0)
    chosen = [i for i in range(USERS) if np.any(known[i])]
    assert loads[name]["snapshots"] == len(chosen) > 0
    for layer in range(2):
      tokens_of = run.expert[layer, chosen] if run.task_expert is None else run.task_expert[layer, chosen, view]
      assert loads[name]["load"][layer] == pytest.approx([np.mean(tokens_of == e) for e in range(EXPERTS)], abs=1e-4)
    assert "gate" not in loads[name]


def test_the_gate_is_the_mean_over_the_snapshots_that_load_counts(make_run) -> None:
  run = make_run(gate=True)
  loads = evaluate.evaluate(run, compare=False, progress=False)["expert_load"]
  view = list(run.cfg.active_views).index("dwell")
  chosen = run.labels["dwell"].known.any(axis=1)
  assert loads["dwell"]["gate"] == pytest.approx(run.gate[chosen, view].mean(axis=0), abs=1e-4)


def test_a_task_without_any_label_is_left_out_of_the_metrics(make_run) -> None:
  run = make_run(gate=True)
  for name in ("click", "plan"):
    run.labels[name].known[:] = False
  result = evaluate.evaluate(run, compare=False, progress=False)
  assert set(run.cfg.active_views) - set(result["splits"]["test"]) == {"click", "plan"}
  assert result["expert_load"]["click"] == {"snapshots": 0, "load": [[0.0] * EXPERTS] * 2, "gate": [0.0] * EXPERTS}


def test_the_table_says_where_less_is_better(make_run) -> None:
  run = make_run()
  result = evaluate.evaluate(run, progress=False)
  heading, *rows = results_table.results_table(result)
  metric = {r[0]: r[2] for r in rows}
  assert metric["age"] == "rmse (lower is better)" and metric["quiet"] == "auc"
  assert set(heading[4:]) == {b for t in result["splits"]["test"].values() for b in t["baselines"]}
  assert rows[[r[0] for r in rows].index("age")][heading.index("most popular")] == "–"


def test_a_split_without_snapshots_is_an_error(make_run, monkeypatch) -> None:
  run = make_run()
  monkeypatch.setattr(snapshot_batches, "query_batches", lambda *args, **options: iter(()))
  with pytest.raises(ConfigError, match="no validation snapshot"):
    evaluate.evaluate(run, compare=False, progress=False)


def test_models_on_aggregates_learn_each_form_of_answer_within_the_sample_space(monkeypatch) -> None:
  monkeypatch.setattr(baselines, "AT_ONCE", 24)  # so that it takes several parts
  cfg, dataset = make_config(), FakeDataset()
  fitted = baselines.AggregateModels(dataset, cfg)
  asked = [Query(i, str(i), 0, 5, 2, 3) for i in range(USERS)]
  out = fitted.predictions(asked)
  digits = np.array([dataset.digits(i) for i in range(USERS)])
  assert set(out) == {"quiet", "pages", "plan", "age"}
  assert [*out["quiet"]] == ["aggregates + logistic", "aggregates + boosted trees"]
  trees = out["quiet"]["aggregates + boosted trees"]
  out = {n: next(iter(answers.values())) for n, answers in out.items()}
  assert sk.roc_auc_score(digits[:, 0], trees) > 0.95
  counted = {n: (m.snapshots, m.users, m.loss) for n, models in fitted.fitted.items() for m in models.values()}
  inside = sum(dataset.digits(i)[0] for i in range(USERS))
  one_each = (USERS, USERS, "")
  assert counted == {"quiet": (2 * USERS, USERS, ""), "pages": one_each, "age": one_each, "plan": (inside, inside, "")}
  assert sk.roc_auc_score(digits[:, 0], out["quiet"]) == 1
  assert [sk.roc_auc_score(digits[:, v], out["pages"][:, v]) for v in range(2)] == [1, 1]
  assert np.corrcoef(digits[:, 2] - 2 * digits[:, 3], out["age"])[0, 1] > 0.95
  # Of users with quiet == 1, the sample space, no plan is 0.
  assert not out["plan"][:, 0].any()
  inside = digits[:, 0] == 1
  assert (out["plan"][inside].argmax(axis=1) == (digits[:, 0] + digits[:, 1])[inside]).all()
