"""Probes find what is there and nothing else, without looking at what they are asked about."""

import itertools
import warnings

import numpy as np
import pytest
from scipy import stats
from scipy.sparse import csr_array
from scipy.special import ndtr

from supermoe_jax.evaluation import intervals, metrics
from supermoe_jax.probing import mlp, models, resampling
from supermoe_jax.probing import protocol as protocol_lib
from supermoe_jax.probing.label_table import Label
from supermoe_jax.probing.protocol import ProbeRows, Protocol, UnmeasurableLabel
from tests.fixtures.grids import quick_few

ONCE = Protocol(repeats=1)
SMALL = (32, 64)  # widths of an MLP that takes little time
ROWS = 400  # of all that an MLP is asked about, so that one program serves all cases of a kind


def planted(n: int = ROWS, width: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Inputs, and a label that the first of them mostly tells."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, width)).astype(np.float32)
  return x, (x[:, 0] + 0.3 * rng.normal(size=n) > 0).astype(np.float64)


def binary(value: np.ndarray) -> Label:
  return Label("label", "binary", value.astype(np.float64), ("no", "yes"))


def alone(n: int) -> ProbeRows:
  return ProbeRows(np.arange(n))


@pytest.mark.parametrize("name", models.MODELS)
def test_planted_signal_is_found_and_noise_is_not(name: str) -> None:
  x, y = planted()
  noise = np.random.default_rng(5).normal(size=x.shape).astype(np.float32)
  asked = protocol_lib.predict_all(
    {"signal": x, "noise": noise}, binary(y), alone(len(y)), models.make_models([name], SMALL), ONCE
  )
  found = protocol_lib.measure_predictions({"label": asked}, "signal", ONCE)["label"]
  signal, nothing = (found.scores[f][name]["auc"] for f in ("signal", "noise"))
  assert signal.low is not None and signal.low > 0.8
  assert abs(nothing.value - 0.5) < 2 * nothing.half  # an interval misses 0.5 once in twenty
  difference = found.differences["noise"][name]["auc"]
  assert difference.value == pytest.approx(signal.value - nothing.value) and difference.low > 0.2


def test_noise_is_worth_a_half_within_nearly_every_interval() -> None:
  rng = np.random.default_rng(0)
  covered, trials = 0, 25
  for _ in range(trials):
    x, label = rng.normal(size=(100, 3)), binary(rng.permutation(np.repeat([0.0, 1.0], 50)))
    asked = protocol_lib.predict_all({"x": x}, label, alone(100), models.make_models(["logistic"]), ONCE)
    area = protocol_lib.measure_predictions({"label": asked}, "x", ONCE)["label"].scores["x"]["logistic"]["auc"]
    covered += area.low < 0.5 < area.high
  assert covered >= 0.85 * trials


EVERY = list(itertools.product(["binary", "multiclass", "regression"], models.MODELS))


@pytest.mark.parametrize(("kind", "name"), quick_few([c for c in EVERY if c != ("multiclass", "mlp")], EVERY))
def test_no_answer_depends_on_other_rows_asked_about_or_on_their_labels(name: str, kind: str) -> None:
  """So neither a scaler nor anything else is fitted outside the fold."""
  x, y = planted()
  value = {"binary": y, "multiclass": y + (x[:, 1] > 1), "regression": x[:, 0] * 3.0 + y}[kind]
  label = Label("label", kind, value, ("a", "b", "c")[: 3 if kind == "multiclass" else 2])
  if kind == "regression":
    label = label._replace(classes=())
  fit, asked = np.arange(300), np.arange(300, ROWS)
  model = models.make_models([name], SMALL)[name]
  before = model(x, label, fit, asked, 0)
  other = x.copy()
  other[301:] = 1e3 * other[301:] + 5
  hidden = label.value.copy()
  hidden[asked] = np.nan
  after = model(other, label._replace(value=hidden), fit, asked, 0)
  assert np.array_equal(before[0], after[0])
  assert not np.array_equal(before[1], after[1])


def test_the_mlp_learns_xor_which_a_linear_probe_cannot() -> None:
  rng = np.random.default_rng(2)
  x = rng.normal(size=(ROWS, 6)).astype(np.float32)
  label = binary((x[:, 0] > 0) != (x[:, 1] > 0))
  fit, asked = np.arange(300), np.arange(300, ROWS)
  value, chosen = label.value[asked], models.make_models(models.MODELS, SMALL)
  area = {n: metrics.binary_metrics(value, m(x, label, fit, asked, 0))["auc"] for n, m in chosen.items()}
  assert area["mlp"] > 0.95
  assert area["logistic"] < 0.65


def test_all_folds_of_the_mlp_share_one_program() -> None:
  x, y = planted()
  net = models.make_models(["mlp"], SMALL)["mlp"]
  assert isinstance(net, mlp.MlpSettings)
  asked = protocol_lib.predict_all({"x": x}, binary(y), alone(ROWS), {"mlp": net}, ONCE)
  assert len(asked.splits) == 5
  assert mlp._program(net, x.shape[1], 1, "binary")._cache_size() == 1


@pytest.mark.parametrize("name", models.MODELS)
def test_the_same_seed_gives_the_same_figures_with_any_number_of_threads(name: str) -> None:
  x, y = planted()
  chosen = models.make_models([name], SMALL)
  first, second = (protocol_lib.predict_all({"x": x}, binary(y), alone(ROWS), chosen, ONCE, n) for n in (1, 3))
  for a, b in zip(first.predictions["x", name], second.predictions["x", name]):
    assert np.array_equal(a, b)


def test_sparse_inputs_are_probed_as_they_are() -> None:
  x, y = planted(300)
  inputs = csr_array(np.maximum(x, 0))
  asked = protocol_lib.predict_all(
    {"x": inputs}, binary(y), alone(300), models.make_models(["logistic", "lightgbm"]), ONCE
  )
  scores = protocol_lib.measure_predictions({"label": asked}, "x", ONCE)["label"].scores["x"]
  assert min(s["auc"].value for s in scores.values()) > 0.8
  with pytest.raises(TypeError, match="no sparse inputs"):
    protocol_lib.predict_all({"x": inputs}, binary(y), alone(300), models.make_models(["mlp"]), ONCE)


def test_no_user_is_fitted_on_and_asked_about_at_once() -> None:
  rng = np.random.default_rng(0)
  user = rng.integers(0, 60, 300)
  found = protocol_lib.make_folds(binary(rng.integers(0, 2, 300)), ProbeRows(user), Protocol(folds=4, repeats=2))
  assert len(found) == 8
  for split in found:
    assert not set(user[split.fit]) & set(user[split.asked])
    assert sorted([*split.fit, *split.asked]) == list(range(300))
  assert sorted(itertools.chain(*(s.asked for s in found[:4]))) == list(range(300))
  assert not np.array_equal(found[0].asked, found[4].asked)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_folds_are_stratified(kind: str) -> None:
  value = np.random.default_rng(0).permutation(np.repeat([0.0, 1.0, 2.0], [20, 20, 20]))
  if kind == "binary":
    value = np.minimum(value, 1)
  label = Label("label", kind, value, ("a", "b", "c")[: 3 if kind == "multiclass" else 2])
  for split in protocol_lib.make_folds(label, alone(60), ONCE):
    assert np.bincount(value[split.asked].astype(int)).tolist() == ([4, 8] if kind == "binary" else [4, 4, 4])


def test_a_rare_class_is_measured_along_with_the_others() -> None:
  x, y = planted(200)
  value = y.copy()
  value[:2] = 2.0  # fewer than the folds
  label = Label("label", "multiclass", value, ("a", "b", "c"))
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # scikit-learn warns of a class with fewer users than folds
    protocol_lib.make_folds(label, alone(200), ONCE)
  asked = protocol_lib.predict_all({"x": x}, label, alone(200), models.make_models(["logistic", "lightgbm"]), ONCE)
  for answers in asked.predictions.values():
    assert all(a.shape == (len(s.asked), 3) for a, s in zip(answers, asked.splits))
  assert (
    protocol_lib.measure_predictions({"label": asked}, "x", ONCE)["label"].scores["x"]["logistic"]["accuracy"].value
    > 0.75
  )


def test_a_temporal_split_fits_on_earlier_times_and_asks_about_the_last() -> None:
  x, y = planted(300)
  time = np.repeat([1, 2, 3], 100)
  rows = ProbeRows(np.tile(np.arange(100), 3), time)
  (split,) = protocol_lib.make_folds(binary(y), rows, Protocol(temporal=True))
  assert set(time[split.fit]) == {1, 2} and set(time[split.asked]) == {3}
  protocol = Protocol(temporal=True, resamples=200)
  asked = protocol_lib.predict_all(
    {"x": x, "noise": x[:, 1:]}, binary(y), rows, models.make_models(["logistic"]), protocol
  )
  found = protocol_lib.measure_predictions({"a": asked, "b": asked}, "x", protocol, {"mean": ["a", "b"]})
  area = found["a"].scores["x"]["logistic"]["auc"]
  assert area.value == metrics.binary_metrics(y[200:], asked.predictions["x", "logistic"][0])["auc"]
  assert area.low < area.value < area.high
  assert found["a"].differences["noise"]["logistic"]["auc"].low > 0
  # A label and itself err together: their mean is as uncertain as either.
  assert found["mean"].scores["x"]["logistic"]["auc"] == pytest.approx(area)


@pytest.mark.parametrize(
  ("value", "rows", "protocol", "message"),
  [
    ([1, 0, 0, 0, 0, 0, 0, 0], None, ONCE, "1 users have class 'yes', fewer than 5 folds"),
    ([1, 1, 1, 1, 1, 1, 1, 1], None, ONCE, "0 users have class 'no'"),
    ([1, 0, 1], None, ONCE, "3 users have a label, fewer than 5 folds"),
    ([1, 0, 1], None, Protocol(temporal=True), "only one time"),
    ([1, 0, 1, 1], [1, 1, 2, 2], Protocol(temporal=True), "all its labels at the last time are 'yes'"),
    ([0, 0, 1, 0], [1, 1, 2, 2], Protocol(temporal=True), "all its labels at earlier times are 'no'"),
  ],
)
def test_a_label_that_cannot_be_measured_says_why(
  value: list[int], rows: list[int] | None, protocol: Protocol, message: str
) -> None:
  whose = ProbeRows(np.arange(len(value)), None if rows is None else np.array(rows))
  with pytest.raises(UnmeasurableLabel, match=message):
    protocol_lib.make_folds(binary(np.array(value)), whose, protocol)


def test_out_of_fold_figures_are_of_all_rows_at_once() -> None:
  x, y = planted(100)
  asked = protocol_lib.predict_all({"x": x}, binary(y), alone(100), models.make_models(["logistic"]), ONCE)
  whole = np.zeros(100)
  for split, answer in zip(asked.splits, asked.predictions["x", "logistic"]):
    whole[split.asked] = answer
  assert protocol_lib.out_of_fold(asked, ONCE)["x", "logistic"]["auc"] == metrics.binary_metrics(y, whole)["auc"]


def test_folds_intervals_cover_the_true_area() -> None:
  """The area of one input, shifted by d in the positive class, is Φ(d/√2), however it is weighted."""
  true, covered, trials = ndtr(1 / np.sqrt(2)), 0, 200
  rng = np.random.default_rng(0)
  for _ in range(trials):
    y = np.repeat([0.0, 1.0], 60)
    x = rng.normal(size=120) + y
    found = []
    for split in protocol_lib.make_folds(binary(y), alone(120), Protocol(seed=int(rng.integers(1000)))):
      weight = np.ones((1, len(split.asked)))
      found.append(float(resampling.weighted_metrics("binary", y[split.asked], x[split.asked], weight)["auc"][0]))
    interval = intervals.interval_from_folds(found, 1 / 4)
    covered += interval.low <= true <= interval.high
  assert covered / trials > 0.9


def test_bootstrap_intervals_cover_the_true_area_and_are_not_too_wide() -> None:
  true, covered, trials, widths = ndtr(1 / np.sqrt(2)), 0, 200, []
  rng = np.random.default_rng(0)
  for trial in range(trials):
    y = (rng.random(150) < 0.4).astype(np.float64)
    x = rng.normal(size=150) + y
    drawn = np.concatenate(
      [resampling.weighted_metrics("binary", y, x, w)["auc"] for w in resampling.resamples(150, 300, trial)]
    )
    interval = intervals.interval_from_resamples(metrics.binary_metrics(y, 1 / (1 + np.exp(-x)))["auc"], drawn)
    covered += interval.low <= true <= interval.high
    widths.append(interval.half)
  assert 0.9 < covered / trials < 0.99
  assert 0.06 < np.mean(widths) < 0.1


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_weights_count_rows_as_often_as_repeating_them_would(kind: str) -> None:
  rng = np.random.default_rng(0)
  value = rng.integers(0, 3 if kind == "multiclass" else 2, 60).astype(np.float64)
  predicted = rng.random(60).round(1)  # with ties
  if kind == "multiclass":
    predicted = rng.dirichlet(np.ones(4), 60)  # the last class has no label
  elif kind == "regression":
    value = rng.normal(1e4, 2, 60)
    predicted = value + rng.normal(size=60)
  label = Label("label", kind, value, tuple("abcd") if kind == "multiclass" else ())
  weight = rng.multinomial(60, np.full(60, 1 / 60), 3).astype(np.float64)
  found = resampling.weighted_metrics(kind, value, predicted, np.concatenate([weight, np.ones((1, 60))]))
  for i, count in enumerate([*weight.astype(int), np.ones(60, int)]):
    expected = protocol_lib.prediction_metrics(label, np.repeat(value, count), np.repeat(predicted, count, axis=0))
    for name, values in found.items():
      assert values[i] == pytest.approx(expected[name], rel=1e-6), name


def test_a_resample_without_one_class_has_no_area() -> None:
  found = resampling.weighted_metrics(
    "binary", np.array([0.0, 1.0]), np.array([0.1, 0.9]), np.array([[2.0, 0.0], [1.0, 1.0]])
  )
  assert np.isnan(found["auc"][0]) and found["auc"][1] == 1


def test_an_interval_of_folds_is_students_with_the_variance_of_folds_that_share_rows() -> None:
  scores = [0.6, 0.7, 0.65, 0.75]
  found = intervals.interval_from_folds([*scores, None], 1 / 3)
  error = np.sqrt(np.var(scores, ddof=1) * (1 / 4 + 1 / 3))
  low, high = stats.t.interval(0.95, 3, 0.675, error)
  assert found == pytest.approx((0.675, low, high))
  assert intervals.interval_from_folds([0.6, None], 1 / 4) == intervals.Interval(0.6)
  assert intervals.interval_from_folds([None], 1 / 4) == intervals.Interval(None)


def test_an_interval_of_resamples_ends_at_their_percentiles() -> None:
  drawn = np.append(np.arange(1001) / 1000, np.nan)
  assert intervals.interval_from_resamples(0.4, drawn) == pytest.approx((0.4, 0.025, 0.975))


def test_the_best_model_is_that_of_the_smallest_error_and_of_the_largest_area() -> None:
  scores = {n: {m: intervals.Interval(v) for m in ("auc", "rmse")} for n, v in (("a", 0.6), ("b", 0.8), ("c", None))}
  assert protocol_lib.best_model(scores, "auc") == "b"
  assert protocol_lib.best_model(scores, "rmse") == "a"
