"""Folds of users: every labelled user outside of validation is tested once, and never in a fold that trains on it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.config import task_checks
from supermoe_jax.data.dataset import snapshot_batches, training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.supervision import Supervision
from supermoe_jax.data.dataset.user_folds import dealt_record
from supermoe_jax.data.encoding.splits import SPLITS, TEST, TRAIN, VALIDATION, fold_split, user_split
from supermoe_jax.errors import ConfigError
from supermoe_jax.evaluation import baselines

FOLDS = 4
TASK = "paid"


def in_fold(cfg: config.Config, fold: int, folds: int = FOLDS) -> config.Config:
  train = dataclasses.replace(cfg.train, user_folds=folds, user_fold=fold)
  return dataclasses.replace(cfg, train=train)


def labelled(dataset: Dataset, cfg: config.Config, split: int) -> dict[str, set[float]]:
  """Returns the labels of each user that are known at snapshots of a split."""
  supervision = Supervision(dataset, cfg, training=split == TRAIN)
  out: dict[str, set[float]] = {}
  for index in range(len(dataset)):
    record = dataset[index]
    chosen = np.flatnonzero(record["snapshot_split"] == split)
    targets = supervision.at_snapshots(record, dataset.history(record), chosen)[TASK]
    if targets.known.any():
      out[record["user"]] = set(targets.value[targets.known].tolist())
  return out


@pytest.mark.parametrize("split", [config.Split(), config.Split(user_validation=0.25, user_test=0.05)])
@pytest.mark.parametrize("folds", [2, 5, 7])
def test_every_user_outside_of_validation_is_tested_in_one_fold(split: config.Split, folds: int) -> None:
  users = [f"u{i}" for i in range(3000)]
  parts = np.array([[fold_split(u, split, k, folds) for k in range(folds)] for u in users])
  validation = np.array([user_split(u, split) == VALIDATION for u in users])
  assert (parts[validation] == VALIDATION).all()
  rest = parts[~validation]
  assert ((rest == TEST).sum(axis=1) == 1).all() and ((rest == TRAIN).sum(axis=1) == folds - 1).all()
  tested = (rest == TEST).mean(axis=0)
  np.testing.assert_allclose(tested, 1 / folds, atol=0.04)


def test_no_user_is_trained_on_and_tested_in_one_fold(dataset: Dataset, cfg: config.Config) -> None:
  own = {s: labelled(dataset, cfg, s) for s in (TRAIN, VALIDATION, TEST)}
  truth = {u: v for users in own.values() for u, v in users.items()}
  tested: list[str] = []
  for fold in range(FOLDS):
    known = {s: labelled(dataset, in_fold(cfg, fold), s) for s in (TRAIN, VALIDATION, TEST)}
    for one, other in ((TRAIN, VALIDATION), (TRAIN, TEST), (VALIDATION, TEST)):
      assert not known[one].keys() & known[other].keys()
    assert known[VALIDATION] == own[VALIDATION]
    assert all(truth[u] == v for users in known.values() for u, v in users.items())  # labels stay what they are
    tested += known[TEST]
  assert len(tested) == len(set(tested)) > len(own[TEST])
  assert set(tested) <= set(truth) - set(own[VALIDATION])
  assert len(tested) >= 0.9 * (len(truth) - len(own[VALIDATION]))  # a user without a test snapshot has no test label


def test_batches_have_the_labels_of_the_fold(dataset: Dataset, cfg: config.Config) -> None:
  for fold in range(FOLDS):
    folded = in_fold(cfg, fold)
    batches = list(snapshot_batches.query_batches(dataset, folded, split=SPLITS["test"]))
    asked = {q.user_id for b in batches for q, known in zip(b.questions, b.labels[TASK].known) if known}
    assert asked and asked == {u for u in asked if fold_split(u, cfg.data.split, fold, FOLDS) == TEST}
    users = [u for u in range(len(dataset)) if fold_split(dataset[u]["user"], cfg.data.split, fold, FOLDS) == TEST]
    row = training_batches._TrainingRow(dataset, folded)
    for user in users:
      assert not row.random_map(user, np.random.default_rng(0)).targets[TASK].known.any()


def test_baselines_are_fitted_on_the_training_users_of_the_fold(dataset: Dataset, cfg: config.Config) -> None:
  folded = in_fold(cfg, 1)
  fitted = baselines.AggregateModels(dataset, folded).fitted[TASK]
  assert {m.users for m in fitted.values()} == {len(labelled(dataset, folded, TRAIN))}


def test_without_folds_a_record_stays_what_it_is(dataset: Dataset, cfg: config.Config) -> None:
  record = dataset[0]
  assert dealt_record(record, cfg) is record


def test_settings_of_later_versions_do_not_change_the_hash_of_a_config(cfg: config.Config) -> None:
  assert "user_fold" not in str(config.to_dict(cfg, later=False)["train"])
  assert cfg.hash() != in_fold(cfg, 0).hash() != in_fold(cfg, 1).hash()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (["--config.train.user_fold=1"], "name the number of folds"),
    (["--config.train.user_folds=1"], "at least 2"),
    (["--config.train.user_folds=3", "--config.train.user_fold=3"], r"must lie in \[0, 3\)"),
  ],
)
def test_folds_that_cannot_be_are_an_error(cfg: config.Config, changes: list[str], message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    config.override(cfg, changes)


def test_data_that_cannot_be_folded_are_an_error(cfg: config.Config) -> None:
  by_user = dataclasses.replace(cfg.data, split=dataclasses.replace(cfg.data.split, mode="user"))
  dated = config.DatedLabel(files=("labels.csv",), user="user", time="time", column="late", positive=("yes",))
  assert task_checks.can_fold_users(cfg)
  for changed in (
    dataclasses.replace(cfg, data=by_user),
    dataclasses.replace(cfg, tasks={**cfg.tasks, "late": dated}),
  ):
    assert not task_checks.can_fold_users(changed)
    with pytest.raises(ConfigError, match="another mode than 'user'"):
      task_checks.check_user_folds(in_fold(changed, 0))
