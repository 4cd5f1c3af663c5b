"""The properties of the loss with task indicators, with a task of every kind and each way to weigh them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax import config, device_mesh
from supermoe_jax.batch import Batch
from supermoe_jax.data.dataset import training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.layers.routing import auxiliary
from supermoe_jax.models.supermoe import SuperMoE
from supermoe_jax.training import losses, task_losses, task_statistics, weighting
from supermoe_jax.training.sampled_softmax import drawing_rows
from supermoe_jax.training.step import model_constructor
from supermoe_jax.training.task_losses import TaskStatistics
from tests.fixtures.grids import quick_few
from tests.fixtures.short_runs import ONE_BLOCK, only

METHODS = ("equal", "static", "uncertainty", "famo", "seesaw", "pcgrad", "cagrad")
# One whose weights come from the losses of the past, one that asks for the tasks' gradients. The weights of all methods
# are in `test_weighting.py`.
FEW = ("seesaw", "pcgrad")
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def batch(every_task: config.Config, every_task_dataset: Dataset) -> Batch:
  """Training rows in which every task has labels, and lacks some."""
  parts = list(itertools.islice(training_batches.training_batches(every_task_dataset, every_task), 3))
  return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


@pytest.fixture(scope="module")
def measured(every_task: config.Config, every_task_dataset: Dataset) -> dict[str, TaskStatistics]:
  stream = training_batches.training_batches(every_task_dataset, every_task)
  return task_statistics.measure_tasks(
    every_task.active_tasks, every_task_dataset.schema.outputs, stream, 30
  ).statistics


def few_of(every_task: config.Config, method: str) -> config.Config:
  """Fewer tasks, for what is compiled once a weighting; of one, a task of each form of loss."""
  kept = ("bought", "long", "age") + (("next_page", "alike") if method == "seesaw" else ())
  informed = ("--config.model.conditioning=token", "--config.train.task_information=10000.0")
  return config.override(every_task, [only(every_task, *kept), *ONE_BLOCK, *informed])


@pytest.fixture
def few(every_task: config.Config, method: str) -> config.Config:
  return few_of(every_task, method)


@pytest.fixture(scope="module")
def weighed(every_task: config.Config, every_task_dataset: Dataset, measured: dict[str, TaskStatistics]):
  """`method → jitted batch → (loss, gradient, weighting state after, before)`, dropout off; compiled once each."""

  @functools.cache
  def get(method: str):
    few = few_of(every_task, method)
    graph, model = nnx.split(model_constructor(few, every_task_dataset.schema)())
    weigher = weighting.make_weigher(config.Weighting(method=method), few.active_tasks)
    state = weigher.initial()
    if method in ("uncertainty", "famo"):
      state["log"] = jnp.linspace(-0.5, 0.5, len(few.active_tasks))

    def step(model: nnx.State, batch: Batch):
      def objective(model: nnx.State) -> tuple[jax.Array, losses.Loss]:
        merged = nnx.merge(graph, model, copy=True)
        out = losses.total_loss(merged, batch, measured, few.train, weigher, state, key=KEY, training=False)
        return out.total, out

      (_, out), gradient = jax.value_and_grad(objective, has_aux=True)(model)
      seen = out.seen._replace(after=0.9 * out.seen.mean, pull=out.pull)
      return out, gradient, weigher.update(state, seen)

    jitted = jax.jit(step)
    return lambda batch: (*jitted(model, batch), state)

  return get


def with_target(batch: Batch, name: str, **changes: np.ndarray) -> Batch:
  return batch._replace(targets={**batch.targets, name: batch.targets[name]._replace(**changes)})


def assert_bitwise_equal(one: object, other: object) -> None:
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(a, b)


def test_every_task_has_labels_and_lacks_some(batch: Batch, every_task: config.Config) -> None:
  for name in every_task.active_views:
    assert batch.targets[name].known.any() and not batch.targets[name].known.all(), name
  assert batch.slices["alike"].known.any()


@pytest.mark.slow
@pytest.mark.parametrize("method", quick_few(FEW, METHODS))
def test_masked_labels_may_be_anything(weighed, batch: Batch, few: config.Config, method: str) -> None:
  clean = weighed(method)(batch)
  assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(clean[1]))
  for poison in (np.nan, np.inf, -np.inf):
    poisoned = batch
    for name in few.active_views:
      target = batch.targets[name]
      if target.value.dtype != np.float32:
        continue
      known = target.known if target.value.ndim == 2 else target.known[..., None]
      poisoned = with_target(poisoned, name, value=np.where(known, target.value, poison).astype(np.float32))
    assert_bitwise_equal(weighed(method)(poisoned)[:3], clean[:3])


@pytest.mark.slow
@pytest.mark.parametrize("method", quick_few(FEW, METHODS))
def test_an_absent_task_moves_nothing(weighed, batch: Batch, few: config.Config, method: str) -> None:
  whole, all_moved, _, _ = weighed(method)(batch)
  for gone in few.active_tasks:
    if gone == "alike":
      slices = batch.slices["alike"]
      none = batch._replace(slices={"alike": slices._replace(known=np.zeros_like(slices.known))})
    else:
      known = np.zeros_like(batch.targets[gone].known)
      none = with_target(batch, gone, known=known, weight=np.zeros_like(batch.targets[gone].weight))
    out, gradient, after, before = weighed(method)(none)
    index = list(few.active_tasks).index(gone)
    assert float(out.tasks[gone].weight) == 0 and not bool(out.seen.present[index])
    if gone != "alike":  # nor is its head moved by another task
      assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradient["heads"][gone]))
      assert any(np.asarray(g).any() for g in jax.tree.leaves(all_moved["heads"][gone])), gone
    for name in few.active_tasks:
      if name != gone:
        assert_bitwise_equal(out.tasks[name], whole.tasks[name])
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
      np.testing.assert_array_equal(np.asarray(old)[index], np.asarray(new)[index])
    if method not in ("pcgrad", "cagrad"):  # theirs depend on who is there, the others' on the past alone
      np.testing.assert_array_equal(out.weights, whole.weights)


@pytest.mark.slow
@pytest.mark.parametrize("method", quick_few(FEW, METHODS))
def test_weights_are_positive_sum_to_the_tasks_and_multiply_the_losses(
  weighed, batch: Batch, few: config.Config, measured: dict[str, TaskStatistics], method: str
) -> None:
  out, _, _, _ = weighed(method)(batch)
  w = np.asarray(out.weights)
  assert (w >= 0).all() and w.sum() == pytest.approx(len(few.active_tasks), rel=1e-4)
  rows = len(batch.features.length)
  terms = [
    w[i] * float(out.tasks[n].total) / (measured[n].rate * rows * measured[n].constant_loss)
    for i, n in enumerate(few.active_tasks)
  ]
  aux = jax.vmap(auxiliary)(out.encoded.experts.sums)
  regularisers = few.train.balance_weight * aux.balance_loss.sum() + few.train.z_weight * aux.z_loss.sum()
  informed = few.train.task_information * aux.mutual_information.sum()
  assert informed > 0.01  # at the start tasks are hardly told apart: hence the large factor
  assert float(out.total) == pytest.approx(sum(terms) + float(regularisers - informed), rel=1e-4)


@pytest.fixture(scope="module")
def by_task(every_task: config.Config, every_task_dataset: Dataset, measured: dict[str, TaskStatistics], batch: Batch):
  """Each task's loss differentiated by all parameters, without weights; some heads start at 0, so all are moved."""
  graph, model = nnx.split(model_constructor(config.override(every_task, ONE_BLOCK), every_task_dataset.schema)())
  model = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(KEY, p.shape), model)
  weigher = weighting.make_weigher(config.Weighting(), every_task.active_tasks)

  def terms(model: nnx.State) -> dict[str, jax.Array]:
    merged = nnx.merge(graph, model, copy=True)
    out = losses.total_loss(
      merged, batch, measured, every_task.train, weigher, weigher.initial(), key=KEY, training=False
    )
    return {n: t.total for n, t in out.tasks.items()}

  return jax.jit(jax.jacrev(terms))(model)


@pytest.mark.nightly
@pytest.mark.slow
def test_the_loss_of_a_task_has_no_gradient_at_another_tasks_head(by_task, every_task: config.Config) -> None:
  for task in every_task.active_tasks:
    for head, gradient in by_task[task]["heads"].items():
      moved = any(np.asarray(g).any() for g in jax.tree.leaves(gradient))
      assert moved == (head == task), (task, head)
    assert any(np.asarray(g).any() for g in jax.tree.leaves(by_task[task]["encoder"])), task


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", quick_few(["token"], ["none", "token", "mmoe", "ple"]))
def test_every_task_trains_the_representation_that_is_exported(
  every_task: config.Config,
  every_task_dataset: Dataset,
  measured: dict[str, TaskStatistics],
  batch: Batch,
  conditioning: str,
) -> None:
  """z of each snapshot that has a label of a task has a gradient of the task's loss, and of no other snapshot."""
  some = only(every_task, "next_page", "sampled", "long", "quiet")
  cfg = config.override(every_task, [some, *ONE_BLOCK, f"--config.model.conditioning={conditioning}"])
  graph, variables = nnx.split(model_constructor(cfg, every_task_dataset.schema)())
  variables = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(KEY, p.shape), variables)

  def losses_of(z: jax.Array | None) -> dict[str, task_losses.TaskLoss]:
    model = nnx.merge(graph, variables, copy=True)
    encoded = model.encoder(batch.features, dropless=True)
    encoded = model.share(encoded if z is None else encoded._replace(z=z))
    drawn = losses.drawn_codes(model, batch, KEY)
    labelled = {n: t for n, t in model.tasks.items() if t.has_labels}
    return {n: task_losses.labelled_loss(model, n, encoded, batch.targets[n], measured[n], drawn) for n in labelled}

  z = jax.jit(lambda: nnx.merge(graph, variables, copy=True).encoder(batch.features, dropless=True).z)()
  moved = jax.jit(jax.jacrev(lambda z: {n: loss.total for n, loss in losses_of(z).items()}))(z)
  for name, gradient in moved.items():
    task, known = cfg.active_tasks[name], np.asarray(batch.targets[name].known)
    known = known[:, known.shape[1] - z.shape[1] * task.asked_events :]
    asked = known.reshape(*z.shape[:2], -1).any(axis=-1)
    np.testing.assert_array_equal(np.asarray(gradient).any(axis=-1), asked, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("method", quick_few(["static"], ["static", "pcgrad"]))
def test_permuting_tasks_leaves_the_loss_and_permutes_the_weights(
  every_task: config.Config, every_task_dataset: Dataset, measured: dict[str, TaskStatistics], batch: Batch, method: str
) -> None:
  few = {n: every_task.active_tasks[n] for n in ("paid", "quiet", "tier", "next_page")}
  model = config.override(every_task, ONE_BLOCK).model

  def loss_of(order: tuple[str, ...]) -> tuple[float, dict[str, float]]:
    tasks = {n: few[n] for n in order}
    graph, state = nnx.split(SuperMoE(model, every_task_dataset.schema, tasks, rngs=nnx.Rngs(params=0)))
    reference = nnx.state(SuperMoE(model, every_task_dataset.schema, few, rngs=nnx.Rngs(params=0)))
    state = nnx.merge_state(state, reference)  # the same parameters by name
    weigher = weighting.make_weigher(config.Weighting(method=method), tasks)

    def value(state: nnx.State) -> losses.Loss:
      merged = nnx.merge(graph, state, copy=True)
      return losses.total_loss(
        merged, batch, measured, every_task.train, weigher, weigher.initial(), key=KEY, training=False
      )

    out = jax.jit(value)(state)
    return float(out.total), dict(zip(order, np.asarray(out.weights).tolist()))

  total, weights = loss_of(tuple(few))
  mine, permuted = loss_of(("tier", "next_page", "paid", "quiet"))
  assert mine == pytest.approx(total, rel=1e-5)
  assert permuted == pytest.approx(weights, rel=1e-3)


@pytest.fixture(scope="module")
def sampling(every_task: config.Config, every_task_dataset: Dataset) -> SuperMoE:
  """A model that predicts next values by a sampled softmax alone."""
  return model_constructor(
    config.override(every_task, [only(every_task, "sampled"), *ONE_BLOCK]), every_task_dataset.schema
  )()


def test_a_batch_of_more_rows_than_values_draws_no_more_of_them(
  every_task: config.Config, sampling: SuperMoE, batch: Batch
) -> None:
  drawn = losses.drawn_codes(sampling, batch, KEY)["sampled"]
  assert every_task.tasks["sampled"].negatives == 6 and drawn.shape == (24, 1)
  assert np.flatnonzero(drawn).tolist() == [0, 4, 8, 12, 16, 20]


def test_rows_that_draw_need_not_divide_over_the_devices(
  every_task: config.Config, sampling: SuperMoE, batch: Batch
) -> None:
  """Six of 24 rows draw, which lie on eight devices."""
  task = every_task.tasks["sampled"]
  drawn = {"sampled": np.asarray(losses.drawn_codes(sampling, batch, KEY)["sampled"])}
  state = jax.random.normal(KEY, (24, 5, every_task.model.d_model))
  right = jax.random.randint(KEY, (24, 5, 2), 2, 9).at[:, ::2, 1].set(0)

  def loss(state: jax.Array) -> jax.Array:
    return task_losses._next_value_loss(sampling, "sampled", task, state, right, (), drawn, 1.0)

  wanted = jax.jit(loss)(state)
  with jax.set_mesh(device_mesh.make_mesh(config.Mesh(8))):
    np.testing.assert_allclose(jax.jit(loss)(state), wanted, rtol=1e-5)


@settings(deadline=None)
@given(rows=st.integers(1, 5000), negatives=st.integers(1, 5000))
def test_rows_that_draw_are_enough_and_fewer_than_twice_as_many(rows: int, negatives: int) -> None:
  drawing = len(range(0, rows, drawing_rows(rows, negatives)))
  assert min(rows, negatives) <= drawing < 2 * negatives


@pytest.mark.nightly
@pytest.mark.slow
def test_micro_batch_gradients_sum_to_the_whole_batchs(
  every_task: config.Config, every_task_dataset: Dataset, measured: dict[str, TaskStatistics], batch: Batch
) -> None:
  labelled = config.override(
    every_task,
    [
      "--config.exclude_tasks=('alike', 'sampled')",  # a contrast is about pairs of rows, and draws are a batch's own
      "--config.model.capacity_factor=4.0",
      "--config.train.balance_weight=0.0",  # the balance of a batch is no mean of its parts'
      "--config.train.z_weight=0.0",
      *ONE_BLOCK,
    ],
  )
  graph, model = nnx.split(model_constructor(labelled, every_task_dataset.schema)())
  weigher = weighting.make_weigher(config.Weighting(method="seesaw"), labelled.active_tasks)

  def objective(model: nnx.State, batch: Batch) -> jax.Array:
    merged = nnx.merge(graph, model, copy=True)
    state = weigher.initial()
    return losses.total_loss(merged, batch, measured, labelled.train, weigher, state, key=KEY, training=False).total

  gradient = jax.jit(jax.grad(objective))
  whole = gradient(model, batch)
  parts = [gradient(model, jax.tree.map(lambda a, i=i: a[i * 8 : i * 8 + 8], batch)) for i in range(3)]
  mean = jax.tree.map(lambda *g: sum(g) / 3, *parts)
  for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(np.abs(b).max())))


@pytest.mark.nightly
@pytest.mark.slow
def test_the_jitted_loss_is_the_eager_one(
  every_task: config.Config, every_task_dataset: Dataset, measured: dict[str, TaskStatistics], batch: Batch
) -> None:
  kept = ("quiet", "tier")  # eagerly every operation of every task compiles by itself
  two = config.override(every_task, [f"--config.exclude_tasks={tuple(n for n in every_task.tasks if n not in kept)}"])
  small = jax.tree.map(lambda a: a[:2], batch)
  graph, model = nnx.split(model_constructor(two, every_task_dataset.schema)())
  weigher = weighting.make_weigher(config.Weighting(method="seesaw"), two.active_tasks)

  def value(model: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
    merged = nnx.merge(graph, model, copy=True)
    out = losses.total_loss(merged, batch, measured, two.train, weigher, weigher.initial(), key=KEY)
    return out.total, out.weights

  for a, b in zip(jax.jit(value)(model, small), value(model, small), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4)


def test_the_snapshots_of_a_task_about_events_carry_half_of_its_weight(
  measured: dict[str, TaskStatistics], every_task_dataset: Dataset, every_task: config.Config
) -> None:
  for name in ("next_page", "long"):
    events = snapshots = 0.0
    for batch in itertools.islice(training_batches.training_batches(every_task_dataset, every_task), 60):
      weight = batch.targets[name].weight
      events += weight[:, : every_task.model.max_events].sum()
      snapshots += weight[:, every_task.model.max_events :].sum()
    assert measured[name].snapshot_weight * snapshots == pytest.approx(events, rel=0.15)
    weight = task_losses.snapshot_weight(every_task.tasks[name], measured[name], 3, 5)
    assert weight.tolist() == pytest.approx([1, 1, 1] + [measured[name].snapshot_weight] * 2)
  assert task_losses.snapshot_weight(every_task.tasks["quiet"], measured["quiet"], 3, 5) == 1.0
