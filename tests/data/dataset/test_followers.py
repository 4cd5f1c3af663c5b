"""The followers of a prepared dataset's values: counted in plain loops, tuned where there is validation, or not."""

from typing import cast

import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset import followers as module
from supermoe_jax.data.dataset import pair_counts, snapshot_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.followers import Followers, followers
from supermoe_jax.data.dataset.pair_counts import DECAY, FollowCounts, PairSetting, gain_of_ranks
from supermoe_jax.data.encoding.splits import VALIDATION

NAME = "next_page"


def asked(cfg: config.Config, *settings: str) -> tuple[config.Config, config.NextEvent]:
  cfg = config.override(cfg, [f"--config.{s}" for s in settings])
  return cfg, cast(config.NextEvent, cfg.tasks[NAME])


def reference(dataset: Dataset, setting: PairSetting, simultaneous: bool) -> tuple[np.ndarray, np.ndarray]:
  """Returns the damped counts of j after i, `[items, items]`, and the training events of each item, in plain loops."""
  items, column = dataset.schema.categorical["page"] - 2, dataset.schema.field("page")
  follow, count = np.zeros((items, items)), np.zeros(items)
  for user in range(len(dataset)):
    history = dataset.history(dataset[user])
    kept = [i for i in range(history.n_train) if history.codes[i, column] >= 2]
    values = [int(history.codes[i, column]) - 2 for i in kept]
    moments = sorted({int(history.time[i]) for i in kept})
    for a in range(len(kept)):
      count[values[a]] += 1
      for b in range(a + 1, min(a + setting.window, len(kept) - 1) + 1):
        apart = b - a
        if simultaneous:
          apart = moments.index(history.time[kept[b]]) - moments.index(history.time[kept[a]])
        if apart:
          follow[values[a], values[b]] += DECAY**apart
          follow[values[b], values[a]] += setting.backward * DECAY**apart
  n = np.maximum(count, 1)
  return follow * n[:, None] ** -setting.out_power * n[None, :] ** -setting.in_power, count


@pytest.mark.parametrize(("ties", "width"), [("order", 4), ("set", 4), ("order", 40)])
def test_rows_hold_the_largest_damped_counts_of_the_training_histories(
  cfg: config.Config, dataset: Dataset, ties: str, width: int
) -> None:
  cfg, task = asked(cfg, f"tasks.{NAME}.ties={ties}")
  found = followers(dataset, cfg, NAME, task, width)
  damped, count = reference(dataset, found.setting, ties == "set")
  items = len(count)
  assert found.code.shape == found.number.shape == (items + 2, width)
  assert found.code.dtype == np.int32 and found.number.dtype == found.out.dtype == found.into.dtype == np.float32
  assert not any(x[:2].any() for x in (found.code, found.number, found.out, found.into))
  kept = np.sort(damped, axis=1)[:, ::-1][:, :width]
  past = np.sum(found.setting.fade ** np.arange(found.setting.last))
  scale = items / (count @ kept.sum(axis=1) / count.sum() * past)
  np.testing.assert_allclose(found.number[2:, : kept.shape[1]], kept * scale, rtol=1e-5)
  assert not found.number[2:, items:].any() and not found.code[2:, items:].any()
  for item, (codes, numbers) in enumerate(zip(found.code[2:], found.number[2:])):
    there = codes > 0
    np.testing.assert_array_equal(there, numbers > 0)
    np.testing.assert_allclose(numbers[there], damped[item, codes[there] - 2] * scale, rtol=1e-5)
    assert len(set(codes[there])) == there.sum()
  np.testing.assert_allclose(found.out[2:], np.maximum(count, 1) ** -found.setting.out_power * scale, rtol=1e-5)
  np.testing.assert_allclose(found.into[2:], np.maximum(count, 1) ** -found.setting.in_power, rtol=1e-6)


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_the_setting_is_the_best_one_tried_on_the_known_validation_questions(
  cfg: config.Config, dataset: Dataset, exclude_seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
  cfg, task = asked(cfg, f"tasks.{NAME}.exclude_seen={exclude_seen}")
  reached: list[float] = []
  most = max(cfg.evaluate.cutoffs)

  def score(ranks: np.ndarray, cutoff: int) -> float:
    reached.append(gain_of_ranks(ranks, cutoff))
    assert len(ranks) == n_known and cutoff == most
    return reached[-1]

  questions, right, seen = [], [], []
  for batch in snapshot_batches.query_batches(dataset, cfg, split=VALIDATION):
    label = batch.labels[NAME]
    for i in np.flatnonzero(label.known):
      questions.append(batch.questions[i])
      right.append([label.value[i], *batch.also[NAME][i]])
      seen += [batch.seen[NAME][i]] if exclude_seen else []
  n_known = len(questions)
  assert n_known
  monkeypatch.setattr(pair_counts, "gain_of_ranks", score)
  found = followers(dataset, cfg, NAME, task, 4)
  simultaneous = task.values_of_a_moment(dataset.tie_rate, cfg.data.split.mode) > 0
  counts = FollowCounts(dataset, "page", simultaneous=simultaneous)
  usual = counts.ranks(questions, np.array(right), seen or None)
  counts.setting = found.setting
  best = counts.ranks(questions, np.array(right), seen or None)
  assert reached[0] == pytest.approx(gain_of_ranks(usual, most))
  assert gain_of_ranks(best, most) == pytest.approx(max(reached)) and max(reached) > reached[0]
  assert (found.users, found.pairs) == (counts.users, counts.pairs) and found.users == len(dataset)


def usual_setting(found: Followers) -> bool:
  return found.setting == PairSetting() and bool((found.number > 0).any())


def test_without_a_validation_split_the_setting_is_the_usual_one(
  cfg: config.Config, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
  def refused(ranks: np.ndarray, cutoff: int) -> float:
    raise AssertionError("nothing is to be scored")

  monkeypatch.setattr(pair_counts, "gain_of_ranks", refused)
  cfg, task = asked(cfg, "data.split.validation=()")
  assert usual_setting(followers(dataset, cfg, NAME, task, 4))


def test_without_a_known_label_the_setting_is_the_usual_one(
  cfg: config.Config, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
  def unknown(*args, **kwargs):
    for batch in query_batches(*args, **kwargs):
      label = batch.labels[NAME]
      yield batch._replace(labels={NAME: label._replace(known=np.zeros_like(label.known))})

  query_batches = snapshot_batches.query_batches
  monkeypatch.setattr(module.snapshot_batches, "query_batches", unknown)
  tuned: list[bool] = []
  monkeypatch.setattr(FollowCounts, "tune", lambda *args: tuned.append(True))
  cfg, task = asked(cfg)
  assert usual_setting(followers(dataset, cfg, NAME, task, 4)) and not tuned


def test_of_equal_scores_the_usual_setting_stays(
  cfg: config.Config, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(pair_counts, "gain_of_ranks", lambda ranks, cutoff: 0.5)
  cfg, task = asked(cfg)
  assert usual_setting(followers(dataset, cfg, NAME, task, 4))
