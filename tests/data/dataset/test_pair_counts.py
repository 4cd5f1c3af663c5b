"""The co-occurrence of values: counts and ranks against a plain reference, and what it must not know."""

import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from supermoe_jax.data.dataset import followers, pair_counts
from supermoe_jax.data.dataset.followers import followers_of
from supermoe_jax.data.dataset.pair_counts import DECAY, FollowCounts, PairSetting, gain_of_ranks
from supermoe_jax.data.dataset.snapshot_batches import Query
from supermoe_jax.data.encoding.histories import UserBlock, UserHistory, end_to_end

ITEMS = 7


class SmallLog:
  """Users with random items at random times, several at one time; the first part of each is the training period."""

  def __init__(self, seed: int, users: int = 30):
    rng = np.random.default_rng(seed)
    self.schema = types.SimpleNamespace(field={"item": 0}.get, categorical={"item": ITEMS + 2})
    self.users = []
    for u in range(users):
      n = int(rng.integers(1, 12))
      time, codes = np.sort(rng.integers(0, 8, n)), rng.integers(0, ITEMS + 2, (n, 1)).astype(np.int32)
      none = np.zeros((n, 0), np.float32)
      self.users.append(UserHistory(str(u), time, np.zeros(n, np.int32), codes, none, int(rng.integers(0, n + 1))))

  def __len__(self) -> int:
    return len(self.users)

  def histories(self, users: np.ndarray) -> UserBlock:
    return end_to_end([self.users[int(u)] for u in users])


def odd_times(history: UserHistory) -> np.ndarray:
  return history.time % 2 == 1


def reference_weights(log: SmallLog, window: int, simultaneous: bool, asked=None) -> tuple[np.ndarray, np.ndarray]:
  """The weights of i before j, and the items' counts, in plain loops."""
  weights, counts = np.zeros((ITEMS, ITEMS)), np.zeros(ITEMS)
  for history in log.users:
    counted = np.ones(len(history.time), bool) if asked is None else asked(history)
    kept = [i for i in range(history.n_train) if history.codes[i, 0] >= 2 and counted[i]]
    moments = sorted({int(history.time[i]) for i in kept})
    for place, i in enumerate(kept):
      counts[history.codes[i, 0] - 2] += 1
      for further in range(1, window + 1):
        if place + further >= len(kept):
          break
        j = kept[place + further]
        apart = moments.index(history.time[j]) - moments.index(history.time[i]) if simultaneous else further
        if apart:
          weights[history.codes[i, 0] - 2, history.codes[j, 0] - 2] += DECAY**apart
  return weights, counts


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), simultaneous=st.booleans(), conditioned=st.booleans())
def test_ranks_are_those_of_a_plain_reference(seed: int, simultaneous: bool, conditioned: bool) -> None:
  log, rng = SmallLog(seed), np.random.default_rng(seed)
  asked = odd_times if conditioned else None
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pair_counts, "WINDOWS", (2, 5))
    patch.setattr(pair_counts, "AT_ONCE", 7)
    patch.setattr(pair_counts, "COLLECTED", 20)
    patch.setattr(pair_counts, "SCORES_AT_ONCE", 3 * ITEMS)
    found = FollowCounts(log, "item", simultaneous=simultaneous, asked=asked)
  found.setting = PairSetting(int(rng.choice([2, 5])), 0.25, 0.5, 0.15, 0.7, 3)
  setting = found.setting
  weights, counts = reference_weights(log, setting.window, simultaneous, asked)
  n = np.maximum(counts, 1)
  both = (weights + setting.backward * weights.T) / n[:, None] ** setting.out_power / n[None, :] ** setting.in_power
  users = rng.integers(0, len(log), 25)
  questions = [Query(int(u), str(u), 0, 0, int(rng.integers(0, len(log.users[u].time) + 1)), 0) for u in users]
  target = rng.integers(0, ITEMS + 2, (25, 2))
  seen = [np.unique(rng.integers(0, ITEMS + 2, 3)) for _ in questions]
  for hidden in (None, seen):
    ranks = found.ranks(questions, target, hidden)
    for i, question in enumerate(questions):
      history = log.users[question.user]
      counted = np.ones(len(history.time), bool) if asked is None else asked(history)
      past = [c - 2 for c, k in zip(history.codes[: question.n_events, 0], counted) if c >= 2 and k]
      score = sum((setting.fade**k * both[item] for k, item in enumerate(past[::-1][:3])), np.zeros(ITEMS))
      out = set() if hidden is None else {c - 2 for c in hidden[i]}
      order = sorted((item for item in range(ITEMS) if item not in out), key=lambda j: (-round(score[j], 10), j))
      wanted = [order.index(t - 2) + 1 for t in target[i] if t - 2 in order]
      if not wanted:
        assert ranks[i] == np.inf
        continue
      # Sums in another order may part scores that are equal.
      own = score[order[min(wanted) - 1]]
      alike = sum(score[j] > 0 and abs(score[j] - own) < 1e-9 for j in order)
      assert abs(ranks[i] - min(wanted)) < max(alike, 1)


def test_what_users_do_after_the_training_period_is_not_counted() -> None:
  log = SmallLog(3)
  before = FollowCounts(log, "item", simultaneous=False)
  for history in log.users:
    history.codes[history.n_train :] = 2
  after = FollowCounts(log, "item", simultaneous=False)
  assert before.pairs == after.pairs > 0
  for window in pair_counts.WINDOWS:
    np.testing.assert_array_equal(before._follow[window].toarray(), after._follow[window].toarray())


def test_validation_chooses_the_setting_that_ranks_it_best() -> None:
  """Where b always follows a, a user whose last item is a gets b, and older items must not count."""
  log = SmallLog(0, users=60)
  for u, history in enumerate(log.users):
    pattern = np.array([2, 3, 5, 6] if u % 2 else [5, 6, 2, 3])
    codes = np.resize(pattern, (12, 1)).astype(np.int32)
    none = np.zeros((12, 0), np.float32)
    log.users[u] = UserHistory(history.user, np.arange(12), np.zeros(12, np.int32), codes, none, 12)
  found = FollowCounts(log, "item", simultaneous=False)
  questions = [Query(u, str(u), 0, 0, 5 + u % 4, 0) for u in range(60)]
  target = np.array([log.users[q.user].codes[q.n_events] for q in questions])
  start = found.ranks(questions, target)
  chosen = found.tune(questions, target, None, 1)
  assert chosen != PairSetting() and chosen.window == min(pair_counts.WINDOWS)
  assert np.mean(found.ranks(questions, target) == 1) == 1 > np.mean(start == 1)
  assert found.described() == {**vars(chosen), "users": 60, "pairs": found.pairs}


@pytest.mark.parametrize(("width", "at_once"), [(2, 5), (4, 10**6), (ITEMS + 3, 1)])
def test_the_followers_of_a_value_are_those_with_the_largest_counts(
  width: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(followers, "SORTED_AT_ONCE", at_once)
  counts = FollowCounts(SmallLog(5), "item", simultaneous=False)
  counts.setting = PairSetting(10, 0.25, 0.5, 0.15)
  scores = counts.damped(counts.setting).toarray()
  scores[2, 3] = scores[2, 1]  # equal ones follow each other by their code
  counts.damped = lambda setting: sparse.csr_array(scores)
  found = followers_of(counts, width)
  total = np.sum(found.number[2:].sum(axis=1) * counts.count) / counts.count.sum() * np.sum(0.7 ** np.arange(20))
  assert total == pytest.approx(ITEMS)
  scale = found.out[2] * np.maximum(counts.count[0], 1) ** 0.5
  assert found.code.shape == found.number.shape == (ITEMS + 2, width)
  assert not found.code[:2].any() and not found.out[:2].any() and not found.into[:2].any()
  for item, own in enumerate(scores):
    order = [j for j in sorted(range(ITEMS), key=lambda j: (-own[j], j)) if own[j] > 0][:width]
    assert [j + 2 for j in order] == found.code[item + 2, : len(order)].tolist()
    assert not found.code[item + 2, len(order) :].any() and not found.number[item + 2, len(order) :].any()
    np.testing.assert_allclose(found.number[item + 2, : len(order)], own[order] * scale, rtol=1e-5)
  _, n = reference_weights(SmallLog(5), 1, False)
  np.testing.assert_allclose(found.out[2:], scale * np.maximum(n, 1) ** -0.5, rtol=1e-5)
  np.testing.assert_allclose(found.into[2:], np.maximum(n, 1) ** -0.15, rtol=1e-6)


def test_gain_is_the_mean_over_questions_up_to_the_cutoff() -> None:
  assert gain_of_ranks(np.array([1.0, 3.0, 11.0, np.inf]), 10) == pytest.approx((1 + 0.5) / 4)
  assert gain_of_ranks(np.zeros(0), 10) == 0
