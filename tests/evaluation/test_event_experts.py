"""The routing of events: counted as the model routes them, by event type and by value."""

import types

import jax
import numpy as np
import pytest
from flax import nnx

from supermoe_jax.batch import Features
from supermoe_jax.data.dataset import snapshot_batches
from supermoe_jax.data.encoding.splits import TEST
from supermoe_jax.data.encoding.vocabulary import Hashing, Vocabulary
from supermoe_jax.evaluation import event_experts
from supermoe_jax.training.run import Run


def test_events_and_snapshots_together_make_the_load_that_the_layers_report(run: Run) -> None:
  """The load is counted inside the layers, over every valid token."""

  def stats(variables: nnx.State, features: Features) -> tuple[jax.Array, jax.Array]:
    found = nnx.merge(run.graph, variables, copy=True).encode(features, dropless=True).experts.stats
    return found.expert, found.load

  batch = next(iter(snapshot_batches.query_batches(run.dataset, run.cfg, split=TEST)))
  events = run.event_experts(batch.features)
  with jax.set_mesh(run.mesh):
    snapshots, load = map(np.asarray, jax.jit(stats)(run.variables, batch.features))
  valid, asked = np.asarray(batch.features.segment) > 0, np.asarray(batch.features.query_segment) > 0
  for m in range(len(load)):
    chosen = np.concatenate([events[m][valid].reshape(-1), snapshots[m][asked].reshape(-1)])
    counted = np.bincount(chosen, minlength=run.cfg.model.experts) / len(chosen)
    assert counted == pytest.approx(load[m], abs=2e-3)  # alike up to choices so close that a sum's order decides


def test_every_event_is_counted_once_by_its_type_and_its_values(run: Run) -> None:
  found = event_experts.count_experts(run, progress=False)
  assert found is not None
  tokens, by_source, by_page = 0, 0, 0
  page = run.dataset.schema.field("page")
  first = found["fields"]["page"][0]
  code = run.dataset.encoders.categorical["page"].code(first["name"])
  for batch in snapshot_batches.query_batches(run.dataset, run.cfg, split=TEST):
    valid = np.asarray(batch.features.segment) > 0
    tokens += valid.sum()
    by_source += (np.asarray(batch.features.source)[valid] == 2).sum()
    by_page += (np.asarray(batch.features.codes)[valid][:, page] == code).sum()
  assert found["tokens"] == tokens and found["snapshots"] == run.dataset.manifest["snapshots"]["test"]
  assert [s["name"] for s in found["sources"]] == ["visits", "buys"]
  assert found["sources"][1]["tokens"] == by_source > 0
  assert first["tokens"] == by_page > 0
  assert found["unnamed"] == ["device"]
  assert len(found["fields"]["page"]) <= event_experts.VALUES


def test_the_counts_of_event_types_add_up_to_all(run: Run) -> None:
  found = event_experts.count_experts(run, progress=False)
  assert found is not None
  k, choices = run.cfg.model.experts_per_token, np.array([s["choices"] for s in found["sources"]])
  np.testing.assert_array_equal(choices.sum(axis=0), found["overall"])
  assert choices.sum(axis=(0, 2)).tolist() == [k * found["tokens"]] * len(found["overall"])


def test_a_model_without_experts_has_nothing_to_count(run: Run) -> None:
  none = types.SimpleNamespace(cfg=types.SimpleNamespace(model=types.SimpleNamespace(encoder="gru", moe_every=2)))
  assert event_experts.count_experts(none, progress=False) is None  # type: ignore[arg-type]


def test_values_are_named_and_lists_count_for_each_of_their_values() -> None:
  schema = types.SimpleNamespace(
    categorical={"tag": 5, "id": 4}, extra_columns=("tag",), inputs=("tag", "id"), shares={}, sources=("views", "buys")
  )
  tag = Vocabulary(["red", "blue"], np.array([3, 2]), buckets=2)
  dataset = types.SimpleNamespace(
    schema=schema, encoders=types.SimpleNamespace(categorical={"tag": tag, "id": Hashing(2)})
  )
  # Columns: tag, id, and the second tag. 1 is out of vocabulary, 4 and 5 are hashed, 0 is absent.
  codes = np.array([[2, 2, 3], [2, 3, 0], [5, 2, 4], [1, 2, 0]])
  expert = np.array([[[0, 1], [0, 2], [1, 2], [2, 1]]])
  found = event_experts.count_choices(dataset, np.array([1, 1, 2, 1]), codes, expert, 3)  # type: ignore[arg-type]
  assert found["overall"] == [[2, 3, 3]]
  assert found["sources"] == [
    {"name": "views", "tokens": 3, "choices": [[2, 2, 2]]},
    {"name": "buys", "tokens": 1, "choices": [[0, 1, 1]]},
  ]
  assert {r["name"]: (r["tokens"], r["choices"]) for r in found["fields"]["tag"]} == {
    "red": (2, [[2, 1, 1]]),
    "blue": (1, [[1, 1, 0]]),
    event_experts.HASHED: (2, [[0, 2, 2]]),
    event_experts.OTHER: (1, [[0, 1, 1]]),
  }
  assert found["unnamed"] == ["id"]


def test_lift_is_how_many_times_the_usual_share() -> None:
  row = {"choices": [[6, 2, 0]]}
  lift = event_experts.expert_lift(row, np.array([30.0, 10.0, 0.0]), 0)
  assert lift[:2].tolist() == pytest.approx([1, 1]) and np.isnan(lift[2])
  assert event_experts.expert_lift(row, np.array([10.0, 10.0, 20.0]), 0).tolist() == pytest.approx([3, 1, 0])
