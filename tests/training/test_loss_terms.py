"""The terms of the loss on numbers alone: how they are normalised and summed, and what each form of loss computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax import config
from supermoe_jax.batch import Batch, Targets
from supermoe_jax.layers.memory.remembered import Remembered
from supermoe_jax.models.supermoe import safe_value
from supermoe_jax.training import losses, task_losses, task_statistics
from supermoe_jax.training.answer_forms import FORMS
from supermoe_jax.training.sampled_softmax import draw_items, log_expected_count, sampled_softmax
from supermoe_jax.training.task_losses import TaskLoss, TaskStatistics
from tests.fixtures.grids import quick_few

BINARY = config.FutureEvent(source="visits")


def targets(value: np.ndarray, known: np.ndarray) -> Targets:
  none = np.zeros((*known.shape, 0), np.int32)
  return Targets(value, known, known.astype(np.float32), none, none)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 999), st.sampled_from([1, 3, 7]), st.floats(0.05, 5.0))
def test_micro_batches_add_up_to_the_whole_batch(seed: int, cut: int, rate: float) -> None:
  rng = np.random.default_rng(seed)
  logits, value, known = rng.normal(size=(8, 3)), rng.integers(0, 2, (8, 3)), rng.random((8, 3)) < 0.4
  measured = {"t": TaskStatistics(rate, 0.7)}

  def loss(rows: slice) -> float:
    asked = targets(value[rows].astype(np.float32), known[rows])
    each = FORMS["binary"].loss(jnp.asarray(logits[rows], jnp.float32), safe_value(asked))
    return float(losses.combine({"t": task_losses.task_loss(asked, each)}, measured, jnp.ones(1), 8))

  assert loss(slice(0, cut)) + loss(slice(cut, 8)) == pytest.approx(loss(slice(0, 8)), rel=1e-5)


def test_normalising_by_the_rate_is_unbiased_and_by_the_batch_is_not() -> None:
  """Over random batches the loss is the mean loss of a label, however rare labels are."""
  rng = np.random.default_rng(0)
  every = rng.exponential(size=20_000).astype(np.float32)
  known = rng.random(20_000) < 0.02
  measured = TaskStatistics(float(known.mean()), 1.0)
  normalise = jax.jit(task_losses.normalised, static_argnums=(2, 3))
  means: dict[str, list[float]] = {"rate": [], "batch": []}
  for _ in range(400):
    rows = rng.integers(0, 20_000, 64)
    part = TaskLoss(jnp.float32(every[rows][known[rows]].sum()), jnp.float32(known[rows].sum()))
    for norm, found in means.items():
      found.append(float(normalise(part, measured, 64, norm)))
  error = np.std(means["rate"]) / np.sqrt(400)
  assert abs(np.mean(means["rate"]) - every[known].mean()) < 4 * error
  # A batch without a label delivers nothing: 1 - .98^64 of the nominal weight is left.
  expected = (1 - 0.98**64) * every[known].mean()
  assert np.mean(means["batch"]) == pytest.approx(expected, rel=0.12)


def test_a_task_sums_weighed_losses_and_weights_of_known_labels_alone() -> None:
  known = np.array([[True, True, False], [False, True, True]])
  weight = np.float32([[0.5, 2.0, 9.0], [9.0, 0.0, 4.0]])
  asked = targets(np.zeros((2, 3), np.float32), known)._replace(weight=weight)
  loss = jnp.float32([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
  out = task_losses.task_loss(asked, loss)
  assert (float(out.total), float(out.weight)) == (0.5 * 1 + 2 * 2 + 4 * 6, 0.5 + 2 + 4)
  by_site = task_losses.task_loss(asked, loss, jnp.float32([1.0, 10.0, 100.0]))
  assert (float(by_site.total), float(by_site.weight)) == (0.5 + 10 * 4 + 100 * 24, 0.5 + 20 + 400)


def test_a_sum_is_divided_by_the_constant_loss_only() -> None:
  part = TaskLoss(jnp.float32(6.0), jnp.float32(4.0))
  assert float(task_losses.normalised(part, TaskStatistics(0.5, 2.0), 8, "sum")) == 3.0
  assert float(task_losses.normalised(part, TaskStatistics(0.5, 2.0), 8, "batch")) == 0.75
  assert float(task_losses.normalised(part, TaskStatistics(0.5, 2.0), 8, "rate")) == 0.75


def test_no_gradient_flows_through_the_weights() -> None:
  part = TaskLoss(jnp.float32(2.0), jnp.float32(1.0))
  measured = {"t": TaskStatistics(1.0, 1.0)}
  gradient = jax.grad(lambda w: losses.combine({"t": part}, measured, w, 1))(jnp.ones(1))
  assert float(gradient[0]) == 0.0


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 9999), items=st.integers(2, 40), how=st.sampled_from(["log_uniform", "uniform"]))
def test_expected_counts_are_those_of_the_draws(seed: int, items: int, how: str) -> None:
  counts = np.exp(log_expected_count(how, jnp.arange(items), items, 7))
  assert counts.sum() == pytest.approx(7, rel=1e-4)
  drawn = np.asarray(draw_items(how, items, (4, 1000), jax.random.key(seed)))
  share = np.bincount(drawn.reshape(-1), minlength=items) / drawn.size
  assert np.abs(share - counts / 7).max() < 0.04


@pytest.mark.parametrize("how", quick_few(["log_uniform"], ["log_uniform", "uniform"]))
def test_the_gradient_of_a_sampled_softmax_converges_to_that_of_the_full_one(how: str) -> None:
  rng = np.random.default_rng(0)
  items, sites, d = 30, 5, 4
  rows = jnp.asarray(rng.normal(size=(items, d)), jnp.float32)
  state = jnp.asarray(rng.normal(size=(sites, d)), jnp.float32)
  target = jnp.asarray([[1, 0], [3, 4], [3, 0], [17, 29], [29, 2]])  # 0: no second one

  def full(state: jax.Array, rows: jax.Array) -> jax.Array:
    logits = state @ rows.T
    own = jnp.take_along_axis(logits, target, axis=1)
    own = jax.nn.logsumexp(jnp.where(target > 0, own, -jnp.inf), axis=-1)
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - own)

  def sampled(state: jax.Array, rows: jax.Array, key: jax.Array, draws: int) -> jax.Array:
    drawn = draw_items(how, items, (draws,), key)
    count = log_expected_count(how, drawn, items, draws)
    return jnp.sum(sampled_softmax(state, rows[target], target, rows[drawn], drawn, count))

  @functools.partial(jax.jit, static_argnums=0)
  def estimate(draws: int) -> tuple[jax.Array, ...]:
    """Mean over 2,000 draws, and the deviation of that mean."""
    keys = jax.random.split(jax.random.key(1), 2000)
    each = jax.lax.map(lambda k: jax.grad(sampled, argnums=(0, 1))(state, rows, k, draws), keys, batch_size=100)
    both = jnp.concatenate([g.reshape(len(keys), -1) for g in each], axis=1)
    return both.mean(axis=0), both.std(axis=0) / len(keys) ** 0.5

  wanted = jnp.concatenate([g.reshape(-1) for g in jax.grad(full, argnums=(0, 1))(state, rows)])
  bias = {}
  for draws in (8, 64, 512):
    mean, deviation = estimate(draws)
    bias[draws] = float(jnp.linalg.norm(mean - wanted))
    noise = float(jnp.linalg.norm(deviation))
  # The estimate of a logarithm is biased by 1 / draws, and by nothing else.
  assert bias[8] > 3 * bias[64] > 9 * max(bias[512] - 3 * noise, 0)
  assert bias[512] < 3 * noise + 0.02 * float(jnp.linalg.norm(wanted))


def test_a_sampled_softmax_scores_what_is_remembered_exactly() -> None:
  rng = np.random.default_rng(0)
  rows, sites, items, d, draws = 2, 3, 30, 4, 12
  remembered = Remembered(
    rng.random((rows, sites, 5)).astype(np.float32),
    rng.integers(0, items, (rows, 5, 6)).astype(np.int32),
    rng.random((rows, 5, 6)).astype(np.float32),
  )
  counts = np.zeros((rows, sites, items))
  for b, s, event, c in np.ndindex(rows, sites, 5, 6):
    code = remembered.code[b, event, c]
    counts[b, s, code] += (code > 0) * remembered.weight[b, s, event] * remembered.number[b, event, c]
  vectors, state = rng.normal(size=(items, d)), rng.normal(size=(rows, sites, d + 1))
  target = rng.integers(2, items, (rows, sites, 2)) * np.array([1, 0])
  target[0, :, 1] = 1 + target[0, :, 0]
  drawn, log_count = np.append(rng.integers(2, items, draws - 2), [7, 7]), rng.normal(size=draws)
  score = state[..., :d] @ vectors.T + state[..., d:] * np.log1p(counts)
  found = sampled_softmax(
    *(jnp.asarray(x, jnp.float32) for x in (state, vectors[target])),
    target,
    vectors[drawn],
    drawn,
    log_count,
    (remembered,),
  )
  for b, s in np.ndindex(rows, sites):
    own = [score[b, s, t] for i, t in enumerate(target[b, s]) if t or not i]
    others = [score[b, s, j] - q for j, q in zip(drawn, log_count) if j not in target[b, s]]
    wanted = np.logaddexp.reduce(own + others) - np.logaddexp.reduce(own)
    assert float(found[b, s]) == pytest.approx(wanted, abs=1e-4)


def test_info_nce_equals_a_plain_loop() -> None:
  rng = np.random.default_rng(2)
  z = rng.normal(size=(4, 2, 3))
  known = np.array([True, False, True, True])
  flat = [(i, s) for i in range(4) if known[i] for s in range(2)]
  unit = z / np.linalg.norm(z, axis=-1, keepdims=True)
  total = 0.0
  for i, s in flat:
    scores = {o: unit[i, s] @ unit[o] / 0.2 for o in flat if o != (i, s)}
    total += np.log(sum(np.exp(v) for v in scores.values())) - scores[i, 1 - s]

  def nce(z: jax.Array) -> tuple[jax.Array, TaskLoss]:
    found = task_losses.info_nce(z, jnp.asarray(known), 0.2)
    return found.total, found

  (_, out), gradient = jax.jit(jax.value_and_grad(nce, has_aux=True))(jnp.asarray(z, jnp.float32))
  assert float(out.total) == pytest.approx(total, rel=1e-4) and float(out.weight) == 6
  assert not np.asarray(gradient)[1].any() and np.isfinite(np.asarray(gradient)).all()


class _Length:
  """Features of which only the number of rows matters."""

  codes = np.zeros((4, 3, 1))

  def __init__(self, rows: int):
    self.length = np.zeros(rows)
    self.query_segment = np.ones((rows, 2), np.int32)


def test_constant_losses_are_those_of_the_best_constant() -> None:
  known = np.array([[1, 1], [1, 0], [1, 1], [0, 0]], bool)
  kinds = {
    "binary": (BINARY, np.float32([[1, 0], [0, 0], [1, 1], [0, 1]])),
    "classes": (config.UserLabel(column="c", type="multiclass"), np.int32([[2, 0], [0, 0], [2, 1], [0, 1]])),
    "number": (config.UserLabel(column="c", type="regression"), np.float32([[2, 0], [1, 0], [2, -1], [9, 9]])),
  }
  asked = {n: targets(value, known) for n, (_, value) in kinds.items()}
  found = task_statistics.measure_tasks(
    {n: t for n, (t, _) in kinds.items()}, {"binary": 1, "classes": 3, "number": 1}, [Batch(_Length(4), asked, {})], 1
  ).statistics
  share = 3 / 5
  assert (found["binary"].rate, found["binary"].snapshot_weight) == (pytest.approx(5 / 4), 1.0)
  assert found["binary"].constant_loss == pytest.approx(-share * np.log(share) - (1 - share) * np.log(1 - share))
  shares = np.array([2, 1, 2]) / 5
  assert found["classes"].constant_loss == pytest.approx(-np.sum(shares * np.log(shares)))
  assert found["number"].constant_loss == pytest.approx(np.var([2, 0, 1, 2, -1]))


def test_the_constant_loss_of_moments_is_that_of_the_head_at_its_start() -> None:
  """Any value of a moment is right: the constant answer's probabilities of its values are summed."""
  task, known = config.NextEvent(field="item", ties="set"), np.array([[1, 1, 0], [1, 1, 1]], bool)
  value = np.int32([[2, 4, 3], [3, 2, 5]])
  also = np.int32([[[3, 0], [0, 0], [5, 0]], [[0, 0], [4, 5], [0, 0]]])
  many = targets(value, known)._replace(also=also, weight=1e5 * known)
  batch = Batch(_Length(2), {"t": many}, {})
  measured = task_statistics.measure_tasks({"t": task}, {"t": 4}, [batch], 1)
  share = np.exp(measured.answers["t"])
  np.testing.assert_allclose(share, np.array([1 / 2 + 1 / 3, 1 / 2 + 1, 1 + 1 / 3, 1 / 3 + 1]) / 5, rtol=1e-3)
  sets = [share[[0, 1]].sum(), share[2], share[1], share[[0, 2, 3]].sum(), share[3]]
  assert measured.statistics["t"].constant_loss == pytest.approx(-np.mean(np.log(sets)), rel=1e-3)
  assert measured.full_moments == {"t": pytest.approx(1 / 5)}


def test_a_task_without_any_label_contributes_nothing_and_stays_finite() -> None:
  none = targets(np.zeros((2, 1), np.float32), np.zeros((2, 1), bool))
  measured = task_statistics.measure_tasks({"t": BINARY}, {"t": 1}, [Batch(_Length(2), {"t": none}, {})], 1).statistics
  total = losses.combine({"t": TaskLoss(jnp.float32(0), jnp.float32(0))}, measured, jnp.ones(1), 2)
  assert float(total) == 0.0
