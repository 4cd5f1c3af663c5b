"""How training starts: heads at the best constant answers, and no vector at 0 before a norm."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import config, device_mesh
from supermoe_jax.batch import CALENDAR
from supermoe_jax.data.dataset import training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.layers.event_embedding import QueryEmbedding
from supermoe_jax.training import losses, step, task_losses, task_statistics
from supermoe_jax.training.answer_forms import FORMS
from supermoe_jax.training.run import Run
from supermoe_jax.training.step import create_state, model_constructor
from tests.fixtures.short_runs import ONE_BLOCK

LABELS = {
  "binary": np.array([1, 0, 0, 1, 0], np.float32),
  "multilabel": np.array([[1, 0], [0, 0], [0, 1], [1, 1], [1, 0]], np.float32),
  "multiclass": np.array([2, 0, 0, 1, 2]),
  "catalogue": np.array([4, 2, 2, 3, 4]),
  "regression": np.array([0.5, -1.0, 3.0, 0.0, 1.0], np.float32),
}


@pytest.mark.parametrize("answer", LABELS)
def test_the_constant_answer_has_the_constant_loss(answer: str) -> None:
  form, value, weight = FORMS[answer], LABELS[answer], np.array([1.0, 2.0, 1.0, 0.5, 1.5]) * 1e5
  outputs = {"multilabel": 2, "multiclass": 3, "catalogue": 3}.get(answer, 1)
  first, second = form.moments(value, weight, outputs)
  constant = form.constant_answer(first, second, weight.sum())
  assert constant.shape == (outputs,)
  if answer in ("multiclass", "catalogue"):
    loss = -jax.nn.log_softmax(constant)[value - form.first_code]
  else:
    wide = jnp.broadcast_to(constant if answer == "multilabel" else constant[0], value.shape)
    loss = form.loss(wide, jnp.asarray(value))
  assert np.average(loss, weights=weight) == pytest.approx(form.constant_loss(first, second, weight.sum()), rel=1e-4)


@pytest.mark.parametrize("answer", LABELS)
def test_without_a_label_the_constant_answer_is_undecided(answer: str) -> None:
  constant = FORMS[answer].constant_answer(np.zeros(3), np.zeros(3), 0.0)
  np.testing.assert_allclose(constant, np.full(3, np.log(1 / 3) if answer in ("multiclass", "catalogue") else 0.0))


@pytest.mark.nightly
@pytest.mark.slow
def test_the_first_answers_are_the_base_rates(every_task: config.Config, every_task_dataset: Dataset) -> None:
  """The mean loss of a model whose states say nothing is that of the best constant."""
  cfg = config.override(every_task, ONE_BLOCK)
  schema, mesh = every_task_dataset.schema, device_mesh.make_mesh(cfg.train.mesh)
  batches = list(itertools.islice(training_batches.training_batches(every_task_dataset, cfg), 6))
  measured = task_statistics.measure_tasks(cfg.active_tasks, schema.outputs, batches, 6)
  _, state = create_state(cfg, schema, mesh, measured.answers)
  model = nnx.merge(step.abstract_model(cfg, schema, "cpu")[0], state.model)
  for name in cfg.active_views:
    statistics, total, labels = measured.statistics[name], 0.0, 0.0
    for batch in batches:
      encoded = jax.eval_shape(lambda m, f: m.encode(f, dropless=True), model, batch.features)
      silent = model.share(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), encoded))
      drawn = losses.drawn_codes(model, batch, jax.random.key(0))
      found = task_losses.labelled_loss(
        model, name, silent, batch.targets[name], statistics._replace(snapshot_weight=1), drawn
      )
      total, labels = total + float(found.total), labels + float(found.weight)
    task = cfg.active_tasks[name]
    if task.answer != "catalogue" or task.softmax == "full":
      assert total / labels == pytest.approx(statistics.constant_loss, rel=0.05), name


def test_a_run_starts_at_the_base_rates(run: Run) -> None:
  """Twelve steps move a bias by no more than the rates of these steps."""
  model = nnx.merge(run.graph, run.variables)
  moved = run.cfg.train.steps * run.cfg.train.learning_rate
  share = run.dataset.manifest["label_rates"]["quiet"][0]
  rate = float(np.log(share / (1 - share)))
  assert float(model.heads["quiet"].linear.bias[0]) == pytest.approx(rate, abs=0.3 + moved)
  assert abs(rate) > 0.5 + moved  # so that a start at 0 is found
  scores = model.heads["next_page"].bias.get_value().reshape(-1)[2 : model.encoder.event_embedding.table("page").size]
  assert float(jnp.exp(scores).sum()) == pytest.approx(1, rel=2 * moved)


@pytest.mark.parametrize("aggregates", [0, 3])
def test_no_snapshot_starts_at_zero_before_a_norm(aggregates: int) -> None:
  embedding = QueryEmbedding(64, CALENDAR, aggregates, rngs=nnx.Rngs(0))
  z = embedding(jnp.zeros((1, 2, CALENDAR)), jnp.zeros((1, 2)), jnp.zeros((1, 2, aggregates)))
  assert 0.5 < np.linalg.norm(z[0, 0]) < 2


@pytest.mark.nightly
@pytest.mark.slow
def test_the_first_gradient_is_spread_over_the_model(every_task: config.Config, every_task_dataset: Dataset) -> None:
  """A snapshot that started at 0 had nearly all of the first squared gradient in its calendar's few parameters."""
  cfg = config.override(every_task, [*ONE_BLOCK, "--config.exclude_tasks=('alike',)"])
  schema = every_task_dataset.schema.__class__(
    **{**vars(every_task_dataset.schema), "aggregates": 0, "value_counts": {}}
  )
  batch = next(iter(training_batches.training_batches(every_task_dataset, cfg)))
  batch = batch._replace(features=batch.features._replace(query_aggregates=batch.features.query_aggregates[..., :0]))
  measured = task_statistics.measure_tasks(cfg.active_tasks, schema.outputs, [batch], 1).statistics
  graph, variables = nnx.split(model_constructor(cfg, schema)())

  def total(variables: nnx.State) -> jax.Array:
    model = nnx.merge(graph, variables, copy=True)
    encoded, drawn = model.encode(batch.features, dropless=True), losses.drawn_codes(model, batch, jax.random.key(0))
    found = {
      n: task_losses.labelled_loss(model, n, encoded, batch.targets[n], measured[n], drawn) for n in cfg.active_views
    }
    return sum(task_losses.normalised(f, measured[n], len(batch.features.length), "rate") for n, f in found.items())

  gradient = nnx.to_flat_state(jax.jit(jax.grad(total))(variables))
  square = {path: float(jnp.sum(jnp.square(v.get_value()))) for path, v in gradient}
  of_calendar = sum(s for path, s in square.items() if path[:3] == ("encoder", "query_embedding", "calendar"))
  assert 0 < of_calendar < 0.5 * sum(square.values())
