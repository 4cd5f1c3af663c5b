import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, r2_score, roc_auc_score

from supermoe_jax.evaluation import probes


def test_a_probe_learns_a_linear_label_and_gives_the_rate_of_a_constant_one() -> None:
  rng = np.random.default_rng(0)
  x = rng.normal(size=(400, 5))
  label = np.stack([(x[:, 0] > 0), np.zeros(400)], axis=1).astype(np.float32)
  scores = probes.fit_probe("multilabel", x[:300], label[:300], 2)(x[300:])
  assert roc_auc_score(label[300:, 0], scores[:, 0]) > 0.95
  assert not scores[:, 1].any()


def test_a_probe_of_classes_gives_probabilities_of_all_and_none_to_those_never_seen() -> None:
  rng = np.random.default_rng(0)
  x = rng.normal(size=(600, 3))
  label = np.array([0, 2, 3])[x.argmax(axis=1)]  # class 1 has no example
  scores = probes.fit_probe("multiclass", x[:400], label[:400], 5)(x[400:])
  assert scores.shape == (200, 5)
  assert scores.sum(axis=1) == pytest.approx(1)
  assert not scores[:, [1, 4]].any()
  assert accuracy_score(label[400:], scores.argmax(axis=1)) > 0.9


def test_a_probe_fitted_on_one_class_is_certain_of_it() -> None:
  scores = probes.MultiClassProbe(np.zeros((3, 2)), np.array([1, 1, 1]), 3)(np.ones((2, 2)))
  assert scores.tolist() == [[0, 1, 0], [0, 1, 0]]


def test_a_probe_of_a_number_learns_a_linear_one_whatever_the_inputs_scales() -> None:
  rng = np.random.default_rng(0)
  x = rng.normal(size=(900, 3)) * [1e-3, 1.0, 1e3] + 5
  label = 2e3 * x[:, 0] - x[:, 1] + 1e-3 * x[:, 2] + 7 + 0.1 * rng.normal(size=900)
  assert r2_score(label[600:], probes.fit_probe("regression", x[:600], label[:600], 1)(x[600:])) > 0.97


def test_there_is_no_probe_of_a_ranking() -> None:
  with pytest.raises(ValueError, match="no linear probe of a catalogue"):
    probes.fit_probe("catalogue", np.zeros((2, 1)), np.zeros(2), 9)


def test_probes_take_sparse_inputs() -> None:
  rng = np.random.default_rng(0)
  x = csr_array(np.where(rng.random((900, 20)) < 0.3, rng.random((900, 20)), 0))
  dense = x.toarray()
  number = 3 * dense[:, 0] - dense[:, 1]
  assert roc_auc_score(number[600:] > 0.2, probes.fit_probe("binary", x[:600], number[:600] > 0.2, 1)(x[600:])) > 0.9
  assert r2_score(number[600:], probes.fit_probe("regression", x[:600], number[:600], 1)(x[600:])) > 0.9
  scores = probes.fit_probe("multiclass", x[:600], (dense[:600, :3].argmax(axis=1)), 3)(x[600:])
  assert accuracy_score(dense[600:, :3].argmax(axis=1), scores.argmax(axis=1)) > 0.7


def test_an_amount_is_learnt_with_the_loss_that_ranks_held_out_amounts_better() -> None:
  rng = np.random.default_rng(0)
  x = rng.normal(size=(900, 4))
  label = np.where(rng.random(900) < 0.3, 0, np.exp(x[:, 0] + 0.3 * rng.normal(size=900)) * 20)
  fitted, held = (x[:600], label[:600]), (x[600:], label[600:])
  scores = {
    loss: spearmanr(label[600:], probes.AmountProbe(*fitted, loss)(x[600:])).statistic for loss in ("log1p", "poisson")
  }
  best = probes.fit_amount_probe(*fitted, *held)
  assert scores[best.loss] == max(scores.values()) > 0.3
  # Where the ranks of the held-out amounts turn, the other loss is kept.
  other = probes.fit_amount_probe(*fitted, x[600:], -label[600:])
  assert other.loss != best.loss


def test_answers_of_the_poisson_loss_are_means_and_of_log1p_typical_amounts() -> None:
  rng = np.random.default_rng(1)
  x, label = np.zeros((3000, 1)), rng.lognormal(2, 1, 3000)
  mean, typical = (probes.AmountProbe(x, label, loss)(x[:1])[0] for loss in ("poisson", "log1p"))
  assert mean == pytest.approx(label.mean(), rel=0.01)
  assert typical == pytest.approx(np.expm1(np.log1p(label).mean()), rel=0.01)


@pytest.mark.parametrize("label", [np.linspace(-1, 5, 60), np.zeros(60)])
def test_amounts_without_a_poisson_deviance_are_learnt_by_log1p(label: np.ndarray) -> None:
  x = np.linspace(0, 1, 60)[:, None]
  assert probes.fit_amount_probe(x, label, x, label).loss == "log1p"
  assert probes.fit_amount_probe(x, np.abs(label), x[:0], label[:0]).loss == "log1p"


def test_trees_learn_a_product_of_inputs_that_a_linear_probe_cannot() -> None:
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3000, 4)).astype(np.float32)
  label = (x[:, 0] * x[:, 1] > 0).astype(np.float32)
  trees, line = (make(x[:2000], label[:2000])(x[2000:]) for make in (probes.TreesProbe, probes.Probe))
  assert roc_auc_score(label[2000:], trees) > 0.9 > 0.6 > roc_auc_score(label[2000:], line)


def test_trees_predict_the_rate_of_a_label_of_one_class() -> None:
  x = np.random.default_rng(0).normal(size=(10, 4))
  assert np.all(probes.TreesProbe(x, np.ones(10))(x[:3]) == 1)


def test_each_value_has_a_model_of_its_own_inputs() -> None:
  rng = np.random.default_rng(1)
  x = rng.normal(size=(2000, 4)).astype(np.float32)
  label = np.stack([x[:, 0] + x[:, 1] > 0, x[:, 2] - x[:, 3] > 0], axis=1).astype(np.float32)
  probe = probes.OwnCountsProbe(x, label, [np.array([0, 1]), np.array([2])])
  chances = probe(x)
  assert chances.shape == (2000, 2)
  assert roc_auc_score(label[:, 0], chances[:, 0]) > 0.99
  assert 0.7 < roc_auc_score(label[:, 1], chances[:, 1]) < 0.85  # it may not read the fourth
  np.testing.assert_array_equal(chances[:, 1], probes.Probe(x[:, [2]], label[:, 1])(x[:, [2]]))


def test_the_strength_of_the_regularisation_fits_the_labels_and_never_sees_a_user_twice() -> None:
  rng = np.random.default_rng(0)
  signal = rng.normal(size=(4000, 4))
  clear = (signal @ np.ones(4) + 0.5 * rng.normal(size=4000) > 0).astype(float)
  assert probes.choose_regularisation(signal, clear, np.arange(4000)) == max(probes.REGULARISATIONS)
  # Eight rows a user, all alike but for a little noise, and a label of the user that nothing says: over rows the wide
  # inputs would know each user again, and the weakest strength would win.
  user = np.repeat(np.arange(60), 8)
  wide = rng.normal(size=(60, 200))[user] + 0.1 * rng.normal(size=(480, 200))
  label = rng.permutation(np.arange(60) % 2).astype(float)[user]
  assert probes.choose_regularisation(wide, label, user) == min(probes.REGULARISATIONS)
  assert probes.choose_regularisation(wide, label, np.arange(480)) == max(probes.REGULARISATIONS)
  few = probes.choose_regularisation(wide[:40], label[:40], user[:40])
  assert few == probes.REGULARISATION  # five users
