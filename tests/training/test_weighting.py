"""The tasks' weights: positive, of sum T, without a gradient, and never moved by a task that is not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax import config
from supermoe_jax.training import weighting
from supermoe_jax.training.weighting import ObservedLosses, Weigher, WeightInputs

METHODS = ("equal", "static", "uncertainty", "famo", "seesaw", "pcgrad", "cagrad")
GRADIENT = ("pcgrad", "cagrad")
NAMES = ("a", "b", "c")


def make(method: str, names: tuple[str, ...] = NAMES) -> Weigher:
  prior = {"a": 1.0, "b": 2.0, "c": 0.5} if method in ("static", "seesaw") else dict.fromkeys(NAMES, 1.0)
  tasks = {n: config.FutureEvent(source="s", weight=prior[n]) for n in names}
  return weighting.make_weigher(config.Weighting(method=method), tasks)


@pytest.fixture(scope="module")
def jitted():
  """`(method, names) → (weigher, weights, update)`, compiled once each."""
  made = {}

  def get(method: str, names: tuple[str, ...] = NAMES):
    if (method, names) not in made:
      weigher = make(method, names)
      made[method, names] = weigher, jax.jit(weigher.weights), jax.jit(weigher.update)
    return made[method, names]

  return get


@functools.cache
def key(seed: int) -> jax.Array:
  return jax.random.key(seed)


def gram_of(seed: int, tasks: int = 3) -> np.ndarray:
  g = np.random.default_rng(seed).normal(size=(tasks, 5))
  return (g @ g.T).astype(np.float32)


def observed(seed: int, present: np.ndarray) -> WeightInputs:
  gram = gram_of(seed, len(present)) * np.outer(present, present)
  return inputs(present, gram.astype(np.float32), key(seed))


def inputs(present: np.ndarray, gram: np.ndarray | None, key: jax.Array, order: tuple[int, ...] = (0, 1, 2)):
  labels = np.float32([2.0, 8.0, 0.5]) if len(present) == 3 else np.ones(len(present), np.float32)
  here = labels[list(order)] if len(present) == 3 else labels
  return WeightInputs(present, gram, key, here, 2 * here)


def seen(rng: np.random.Generator, present: np.ndarray) -> ObservedLosses:
  count = np.where(present, rng.integers(1, 50, len(present)), 0).astype(np.float32)
  mean = rng.uniform(0.1, 2.0, len(present))
  after = np.where(present, mean * rng.uniform(0.8, 1.1, len(present)), 0.0)
  pull = count * rng.uniform(0.01, 3.0, len(present))
  return ObservedLosses(
    *(v.astype(np.float32 if v.dtype != bool else bool) for v in (present, count * mean, count, after, pull))
  )


def course(jitted, method: str, seed: int, names: tuple[str, ...] = NAMES, absent: float = 0.4):
  """States and weights over some steps in which tasks come and go."""
  weigher, weights, update = jitted(method, names)
  order = [NAMES.index(n) for n in names]
  rng = np.random.default_rng(seed)
  state = weigher.initial()
  for step in range(14):
    present = rng.random(3) >= absent
    whole = seen(rng, present)
    part = ObservedLosses(*(part[order] for part in whole))
    gram = gram_of(seed + step) * np.outer(present, present)
    at = inputs(part.present, gram[np.ix_(order, order)].astype(np.float32), key(step), tuple(order))
    w = weights(state, at)
    new = update(state, part)
    yield np.asarray(part.present), state, np.asarray(w), new
    state = new


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_weights_are_positive_and_sum_to_the_number_of_tasks(jitted, method: str, seed: int) -> None:
  for present, _, w, _ in course(jitted, method, seed):
    assert np.isfinite(w).all() and (w >= 0).all()
    if method in GRADIENT:
      assert w[present].sum() == pytest.approx(present.sum(), rel=1e-4)
    else:
      assert (w > 0).all() and w.sum() == pytest.approx(3, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_an_absent_tasks_part_of_the_state_stays_bitwise(jitted, method: str, seed: int) -> None:
  for present, old, _, new in course(jitted, method, seed):
    for before, after in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
      np.testing.assert_array_equal(np.asarray(before)[~present], np.asarray(after)[~present])


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), order=st.sampled_from(["cab", "cba"]))
def test_permuting_tasks_permutes_the_weights(jitted, method: str, seed: int, order: str) -> None:
  """In a cycle of three, and where two are swapped: of these all orders are made."""
  whole, permuted = course(jitted, method, seed), course(jitted, method, seed, tuple(order))
  index = [NAMES.index(n) for n in order]
  for (_, _, w, _), (_, _, mine, _) in zip(whole, permuted, strict=True):
    # CAGrad's inner problem is solved step by step, to about three digits.
    np.testing.assert_allclose(mine, w[index], rtol=2e-2 if method == "cagrad" else 2e-4, atol=1e-5)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in GRADIENT])
def test_the_weight_of_a_task_does_not_depend_on_who_is_in_the_batch(jitted, method: str) -> None:
  weigher, weights, _ = jitted(method)
  state = weigher.initial()
  for _, _, _, after in course(jitted, method, 3):
    state = after
  alone, everyone = (weights(state, observed(0, np.array(p))) for p in ([True, False, False], [True] * 3))
  np.testing.assert_array_equal(alone, everyone)


def after_steps(method: str, losses: list[list[float]], afters: list[list[float]] | None = None) -> np.ndarray:
  """The weights after steps with these losses, all tasks present with one label."""
  weigher = make(method)
  state, update = weigher.initial(), jax.jit(weigher.update)
  one, there = np.ones(3, np.float32), np.ones(3, bool)
  for i, loss in enumerate(losses):
    after = None if afters is None else np.array(afters[i], np.float32)
    state = update(state, ObservedLosses(there, np.array(loss, np.float32), one, after))
  return np.asarray(weigher.weights(state, inputs(there, None, jax.random.key(0))))


def test_uncertainty_gives_less_to_the_larger_loss_and_settles_at_its_inverse() -> None:
  w = after_steps("uncertainty", [[2.0, 1.0, 0.5]] * 400)
  np.testing.assert_allclose(w / w[0], [1, 2, 4], rtol=0.02)


def test_famo_gives_more_to_the_task_whose_log_loss_falls_least() -> None:
  w = after_steps("famo", [[1.0, 1.0, 1.0]] * 30, [[0.7, 0.9, 1.0]] * 30)
  behind = w * np.array([0.7, 0.9, 1.0])  # FAMO's own share is this, w is it over the loss
  assert behind[0] < behind[1] < behind[2]


def test_famo_divides_equal_shares_by_the_losses_after_the_step() -> None:
  losses = [[1.0, 2.0, 4.0]]
  w = after_steps("famo", losses, [[0.5, 1.0, 2.0]])  # all fall alike, so that no share moves
  np.testing.assert_allclose(w / w[0], [1, 0.5, 0.25], rtol=1e-5)


def after_pulls(pulls: list[list[float]], labels: tuple[float, ...] = (1.0, 1.0, 1.0), **settings: float) -> np.ndarray:
  """The seesaw weights after steps whose batches have these sums of squared gradients and numbers of labels."""
  tasks = {n: config.FutureEvent(source="s", weight=w) for n, w in zip(NAMES, (1.0, 2.0, 0.5))}
  weigher = weighting.make_weigher(config.Weighting(method="seesaw", **settings), tasks)
  state, update, there = weigher.initial(), jax.jit(weigher.update), np.ones(3, bool)
  count = np.float32(labels)
  for pull in pulls:
    state = update(state, ObservedLosses(there, count, count, None, np.float32(pull)))
  return np.asarray(weigher.weights(state, inputs(there, None, jax.random.key(0))))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_seesaw_makes_a_task_pull_by_the_number_of_its_labels(exponent: float) -> None:
  labels, square = np.array([4.0, 16.0, 1.0]), np.array([8.0, 2.0, 90.0])
  w = after_pulls([list(square)] * 3, tuple(labels), labels_exponent=exponent)
  at = inputs(np.ones(3, bool), None, key(0))
  norm = np.sqrt(square / labels / np.asarray(at.averaged))  # of the mean over a row's labels
  wanted = np.array([1.0, 2.0, 0.5]) * np.asarray(at.independent) ** exponent
  np.testing.assert_allclose(w * norm / (w * norm)[0], wanted / wanted[0], rtol=1e-5)


def test_seesaw_weights_follow_the_gradients_of_the_run() -> None:
  """Weights that a state cancels out of would be the same at the start, in the middle and at the end."""
  first, middle = after_pulls([]), after_pulls([[1.0, 1.0, 4.0]] * 4)
  last = after_pulls([[1.0, 1.0, 4.0]] * 4 + [[9.0, 1.0, 4.0]] * 200)
  assert middle[2] / middle[1] == pytest.approx(first[2] / first[1] / 2, rel=1e-5)
  assert last[0] / last[1] == pytest.approx(middle[0] / middle[1] / 3, rel=0.05)


def test_seesaw_measures_often_at_first_and_seldom_later() -> None:
  weigher = make("seesaw")
  state, measured = weigher.initial(), []
  one, there = np.ones(3, np.float32), np.ones(3, bool)
  for _ in range(64):
    measured.append(bool(weigher.measures(state)))
    state = weigher.update(state, ObservedLosses(there, one, one, None, one))
  assert all(measured[: weighting.FIRST_MEASURED]) and sum(measured) == weighting.FIRST_MEASURED + 3
  assert not any(weigher.measures(make(m).initial()) for m in METHODS for weigher in [make(m)] if m != "seesaw")


def test_pcgrad_equals_projection_of_the_gradients_themselves() -> None:
  rng = np.random.default_rng(5)
  g = rng.normal(size=(2, 4))
  g[1] = -0.5 * g[0] + 0.3 * g[1]  # two tasks in conflict: the order cannot matter
  tasks = {n: config.FutureEvent(source="s") for n in "ab"}
  weigher = weighting.make_weigher(config.Weighting(method="pcgrad"), tasks)
  gram = jnp.asarray(g @ g.T, jnp.float32)
  w = np.asarray(weigher.weights({}, inputs(jnp.ones(2, bool), gram, jax.random.key(0))))
  cut = [g[0] - (g[0] @ g[1]) / (g[1] @ g[1]) * g[1], g[1] - (g[0] @ g[1]) / (g[0] @ g[0]) * g[0]]
  wanted = cut[0] + cut[1]
  mine = w @ g
  np.testing.assert_allclose(mine / np.linalg.norm(mine), wanted / np.linalg.norm(wanted), atol=1e-5)


def test_pcgrad_leaves_gradients_that_agree() -> None:
  weigher = make("pcgrad")
  gram = jnp.asarray(np.ones((3, 3)) + np.eye(3), jnp.float32)
  np.testing.assert_allclose(weigher.weights({}, inputs(jnp.ones(3, bool), gram, jax.random.key(0))), 1.0, rtol=1e-6)


def test_cagrad_raises_the_worst_agreement_and_stays_near_the_mean() -> None:
  rng = np.random.default_rng(1)
  tasks = {n: config.FutureEvent(source="s") for n in NAMES}
  weigher = weighting.make_weigher(config.Weighting(method="cagrad", c=0.5), tasks)
  for _ in range(20):
    g = rng.normal(size=(3, 6))
    g[2] -= 0.7 * g[0]
    w = np.asarray(weigher.weights({}, inputs(jnp.ones(3, bool), jnp.asarray(g @ g.T, jnp.float32), jax.random.key(0))))
    mean = g.mean(0)
    radius = 0.5 * np.linalg.norm(mean)
    # Undo the scaling to weights of sum T: d = mean + λ g_w lies on the ball's border.
    scales = np.linspace(0.01, 3, 30_000)
    inside = scales[np.linalg.norm(scales[:, None] * (w @ g) - mean, axis=1) <= radius * 1.001]
    directions = inside[:, None] * (w @ g)
    direction = directions[np.argmax((directions @ g.T).min(axis=1))]
    grid = [np.array([i, j, 40 - i - j]) / 40 for i in range(41) for j in range(41 - i)]
    inner = min(grid, key=lambda p: (p @ g) @ mean + radius * np.linalg.norm(p @ g))
    best = mean + radius * (inner @ g) / np.linalg.norm(inner @ g)
    size = np.linalg.norm(g, axis=1).max() * np.linalg.norm(mean)
    assert min(g @ direction) >= min(g @ best) - 0.02 * size
    assert min(g @ direction) >= min(g @ mean) - 0.02 * size
