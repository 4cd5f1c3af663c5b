"""Baselines know what a user did before the moment that is asked about, and nothing later."""

import types

import numpy as np

from supermoe_jax import config
from supermoe_jax.data.dataset.snapshot_batches import Query
from supermoe_jax.evaluation import baselines


class OneUser:
  """A dataset of one user, who had item 2 and then item 4."""

  schema = types.SimpleNamespace(field=lambda name: 0, categorical={"item": 6})

  def __getitem__(self, user: int) -> dict[str, np.ndarray]:
    return {"codes": np.array([[2], [4]])}


def test_own_frequency_does_not_count_the_event_that_is_asked_about() -> None:
  after_one_event = Query(0, "u", 0, 0, 1, 0)
  assert baselines.personal_ranks(OneUser(), "item", [after_one_event], np.array([4])).tolist() == [3]


def test_own_frequency_counts_the_events_that_the_question_is_about() -> None:
  class Often(OneUser):
    """A user who had item 2 twice in passing, and item 4 once in earnest."""

    def __getitem__(self, user: int) -> dict[str, np.ndarray]:
      return {"codes": np.array([[2], [2], [4]]), "earnest": np.array([False, False, True])}

    def history(self, record: dict[str, np.ndarray]) -> np.ndarray:
      return record["earnest"]

  after_all = [Query(0, "u", 0, 0, 3, 0)]
  for item, among_all, among_earnest in ((2, 1, 2), (4, 2, 1), (3, 3, 3)):
    assert baselines.personal_ranks(Often(), "item", after_all, np.array([item])).tolist() == [among_all]
    found = baselines.personal_ranks(Often(), "item", after_all, np.array([item]), lambda earnest: earnest)
    assert found.tolist() == [among_earnest]


def test_a_user_gives_the_last_snapshot_and_others_that_a_seed_draws() -> None:
  snapshots = np.array([3, 5, 6, 9, 11])
  task, rng = config.FutureEvent(), np.random.default_rng(0)
  assert baselines._fitted(snapshots, 5, task, rng).tolist() == snapshots.tolist()
  assert baselines._fitted(snapshots, 1, task, rng).tolist() == [11]
  drawn = [tuple(baselines._fitted(snapshots, 3, task, rng).tolist()) for _ in range(40)]
  assert all(d[-1] == 11 and len(d) == 3 and d == tuple(sorted(set(d))) for d in drawn)
  assert {i for d in drawn for i in d} == set(snapshots.tolist())
  # The last snapshot of a time to an event is followed for a short time only.
  alone = {baselines._fitted(snapshots, 1, config.TimeToEvent(), rng).item() for _ in range(80)}
  assert alone == set(snapshots.tolist())


def test_the_best_value_of_a_moment_is_ranked_without_the_others() -> None:
  after_both = Query(0, "u", 0, 0, 2, 0)
  several = np.array([[5, 4, 2], [5, 0, 3], [1, 0, 0]])
  # Own items 2 and 4 stand first, then 3, 5 and 6 by popularity.
  assert baselines.personal_ranks(OneUser(), "item", [after_both] * 3, several).tolist() == [1, 3, np.inf]
  assert baselines.popularity_ranks(several, None).tolist() == [1, 2, np.inf]
  seen = [np.array([2, 4]), np.array([3, 2]), np.array([], int)]
  assert baselines.popularity_ranks(several, seen).tolist() == [2, 2, np.inf]
