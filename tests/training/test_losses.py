"""The properties of the loss with task indicators."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax import config
from supermoe_jax.data import batches
from supermoe_jax.data.batches import Batch, Targets
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.training import losses
from supermoe_jax.training.losses import TaskLoss, TaskStatistics
from supermoe_jax.training.step import build

BINARY = config.FutureEvent(source="visits")


@pytest.fixture(scope="module")
def batch(cfg: config.Config, dataset: Dataset) -> Batch:
  return next(iter(batches.training(dataset, cfg)))


@pytest.fixture(scope="module")
def statistics(cfg: config.Config, dataset: Dataset) -> dict[str, TaskStatistics]:
  return losses.measure(cfg.active_tasks, dataset.schema.outputs, batches.training(dataset, cfg), 30)


@pytest.fixture(scope="module")
def gradient(cfg: config.Config, dataset: Dataset, statistics: dict[str, TaskStatistics]):
  """A jitted `batch → (loss, gradient)`, without dropout."""
  graph, state = nnx.split(build(cfg, dataset.schema)())

  def objective(state: nnx.State, batch: Batch) -> tuple[jax.Array, losses.Loss]:
    out = losses.loss(nnx.merge(graph, state, copy=True), batch, statistics, cfg.train)
    return out.total, out

  jitted = jax.jit(jax.value_and_grad(objective, has_aux=True))
  return lambda batch: jitted(state, batch)


def with_target(batch: Batch, name: str, **changes: np.ndarray) -> Batch:
  return batch._replace(targets={**batch.targets, name: batch.targets[name]._replace(**changes)})


def assert_bitwise_equal(one: object, other: object) -> None:
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_masked_labels_may_be_anything(gradient, batch: Batch, poison: float) -> None:
  clean = gradient(batch)
  assert not all(batch.targets[n].known.all() for n in ("quiet", "pages", "paid"))
  for name in ("quiet", "pages", "paid"):
    target = batch.targets[name]
    value = np.where(target.known if target.value.ndim == 2 else target.known[..., None], target.value, poison)
    assert np.isfinite(value).all() == target.known.all()
    assert_bitwise_equal(gradient(with_target(batch, name, value=value.astype(np.float32))), clean)


def test_an_absent_task_moves_nothing_of_its_own_and_leaves_the_others(gradient, batch: Batch) -> None:
  none = with_target(batch, "paid", known=np.zeros_like(batch.targets["paid"].known))
  (_, out), grads = gradient(none)
  (_, whole), _ = gradient(batch)
  assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads["heads"]["paid"]))
  assert float(out.tasks["paid"].weight) == 0
  for name in ("quiet", "pages", "next_page"):
    assert_bitwise_equal(out.tasks[name], whole.tasks[name])


def test_a_tasks_labels_do_not_move_another_tasks_head(gradient, batch: Batch) -> None:
  flipped = with_target(batch, "quiet", value=1 - batch.targets["quiet"].value)
  one, other = gradient(batch)[1], gradient(flipped)[1]
  assert_bitwise_equal(one["heads"]["pages"], other["heads"]["pages"])
  assert not np.array_equal(
    one["heads"]["quiet"]["linear"]["kernel"][...], other["heads"]["quiet"]["linear"]["kernel"][...]
  )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 999), st.integers(1, 7), st.floats(0.05, 5.0))
def test_micro_batches_add_up_to_the_whole_batch(seed: int, cut: int, rate: float) -> None:
  rng = np.random.default_rng(seed)
  logits, value, known = rng.normal(size=(8, 3)), rng.integers(0, 2, (8, 3)), rng.random((8, 3)) < 0.4
  statistics = {"t": TaskStatistics(rate, 0.7)}

  def loss(rows: slice) -> float:
    targets = Targets(value[rows].astype(np.float32), known[rows])
    part = {"t": losses.task_loss(BINARY, jnp.asarray(logits[rows], jnp.float32), targets)}
    return float(losses.combine(part, {"t": BINARY}, statistics, 8))

  assert loss(slice(0, cut)) + loss(slice(cut, 8)) == pytest.approx(loss(slice(0, 8)), rel=1e-5)


def test_normalising_by_the_rate_is_unbiased() -> None:
  """Over random batches the loss is the mean loss of a label, however rare labels are."""
  rng = np.random.default_rng(0)
  every = rng.exponential(size=20_000).astype(np.float32)
  known = rng.random(20_000) < 0.02
  rate = known.mean()
  statistics = {"t": TaskStatistics(float(rate), 1.0)}
  means = []
  for _ in range(300):
    rows = rng.integers(0, 20_000, 64)
    part = TaskLoss(jnp.float32(every[rows][known[rows]].sum()), jnp.float32(known[rows].sum()))
    means.append(float(losses.combine({"t": part}, {"t": BINARY}, statistics, 64)))
  error = np.std(means) / np.sqrt(len(means))
  assert abs(np.mean(means) - every[known].mean()) < 4 * error


def test_permuting_tasks_leaves_the_loss() -> None:
  parts = {n: TaskLoss(jnp.float32(i + 1.5), jnp.float32(i + 1)) for i, n in enumerate("abc")}
  statistics = {n: TaskStatistics(0.5 + i, 1.0 + i) for i, n in enumerate("abc")}
  tasks = dict.fromkeys("abc", BINARY)
  totals = {
    float(losses.combine({n: parts[n] for n in order}, tasks, statistics, 8)) for order in itertools.permutations("abc")
  }
  assert max(totals) - min(totals) < 1e-6


def test_constant_losses_are_those_of_the_best_constant(
  statistics: dict[str, TaskStatistics], dataset: Dataset
) -> None:
  stream = iter(
    [
      Batch(
        _Length(4),
        {"t": Targets(np.float32([[1, 0], [0, 0], [1, 1], [0, 1]]), np.array([[1, 1], [1, 0], [1, 1], [0, 0]], bool))},
      )
    ]
  )
  measured = losses.measure({"t": BINARY}, {"t": 1}, stream, 1)["t"]
  share = 3 / 5  # of the labels known
  assert (measured.rate, measured.snapshot_weight) == (pytest.approx(5 / 4), 1.0)
  assert measured.constant_loss == pytest.approx(-share * np.log(share) - (1 - share) * np.log(1 - share))
  assert statistics["next_page"].constant_loss <= np.log(dataset.schema.outputs["next_page"]) + 1e-6


class _Length:
  """Features of which only the number of rows matters."""

  def __init__(self, rows: int):
    self.length = np.zeros(rows)


def test_a_task_without_any_label_contributes_nothing_and_stays_finite() -> None:
  stream = iter([Batch(_Length(2), {"t": Targets(np.zeros((2, 1), np.float32), np.zeros((2, 1), bool))})])
  statistics = losses.measure({"t": BINARY}, {"t": 1}, stream, 1)
  total = losses.combine({"t": TaskLoss(jnp.float32(0), jnp.float32(0))}, {"t": BINARY}, statistics, 2)
  assert float(total) == 0.0


def test_a_balanced_router_pays_what_the_weight_says(gradient, batch: Batch, cfg: config.Config, statistics) -> None:
  (total, out), _ = gradient(batch)
  tasks = losses.combine(out.tasks, cfg.active_tasks, statistics, cfg.train.batch_rows)
  aux = out.encoded.experts.aux
  wanted = tasks + cfg.train.balance_weight * aux.balance_loss.sum() + cfg.train.z_weight * aux.z_loss.sum()
  assert float(total) == pytest.approx(float(wanted), rel=1e-5)


def test_the_snapshots_of_a_next_event_task_carry_half_of_its_weight(
  statistics: dict[str, TaskStatistics], dataset: Dataset, cfg: config.Config
) -> None:
  events = snapshots = 0
  for batch in itertools.islice(batches.training(dataset, cfg), 60):
    known = batch.targets["next_page"].known
    events += known[:, : cfg.model.max_events].sum()
    snapshots += known[:, cfg.model.max_events :].sum()
  assert statistics["next_page"].snapshot_weight * snapshots == pytest.approx(events, rel=0.1)
  weight = losses.sample_weight(cfg.tasks["next_page"], statistics["next_page"], 3, 2)
  assert weight.tolist() == pytest.approx([1, 1, 1] + [statistics["next_page"].snapshot_weight] * 2)
  assert losses.sample_weight(cfg.tasks["quiet"], statistics["quiet"], 3, 2) == 1.0
