"""Baselines know what a user did before the moment that is asked about, and nothing later."""

import pathlib
import types

import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.snapshot_batches import Query
from supermoe_jax.data.encoding.histories import UserBlock, UserHistory, end_to_end
from supermoe_jax.data.preparation import prepare
from supermoe_jax.evaluation import baselines, ranking_baselines
from tests.fixtures.small_log import raw_config, write_log


class OneUser:
  """A dataset of one user, who had item 2 and then item 4."""

  schema = types.SimpleNamespace(field=lambda name: 0, categorical={"item": 6})

  def __getitem__(self, user: int) -> dict[str, np.ndarray]:
    return {"codes": np.array([[2], [4]])}


def test_own_frequency_does_not_count_the_event_that_is_asked_about() -> None:
  after_one_event = Query(0, "u", 0, 0, 1, 0)
  assert ranking_baselines.personal_ranks(OneUser(), "item", [after_one_event], np.array([4]))[0].tolist() == [3]


def test_own_recency_ranks_the_last_value_first_and_new_ones_by_popularity() -> None:
  class Often(OneUser):
    """A user who had item 4, and then item 2 and item 5."""

    def __getitem__(self, user: int) -> dict[str, np.ndarray]:
      return {"codes": np.array([[4], [2], [5], [4]])}

  after_three = [Query(0, "u", 0, 0, 3, 0)]
  for place, item in enumerate((5, 2, 4, 3), 1):
    assert ranking_baselines.personal_ranks(Often(), "item", after_three, np.array([item]))[1].tolist() == [place]


def test_own_frequency_counts_the_events_that_the_question_is_about() -> None:
  class Often(OneUser):
    """A user who had item 2 twice in passing, and item 4 once in earnest."""

    def __getitem__(self, user: int) -> dict[str, np.ndarray]:
      return {"codes": np.array([[2], [2], [4]]), "earnest": np.array([False, False, True])}

    def history(self, record: dict[str, np.ndarray]) -> np.ndarray:
      return record["earnest"]

  after_all = [Query(0, "u", 0, 0, 3, 0)]
  for item, among_all, among_earnest in ((2, 1, 2), (4, 2, 1), (3, 3, 3)):
    assert ranking_baselines.personal_ranks(Often(), "item", after_all, np.array([item]))[0].tolist() == [among_all]
    found = ranking_baselines.personal_ranks(Often(), "item", after_all, np.array([item]), lambda earnest: earnest)
    assert found[0].tolist() == [among_earnest]


@pytest.mark.parametrize("at_once", [2, 100])
def test_what_is_popular_lately_counts_the_days_before_the_question(
  at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(ranking_baselines, "AT_ONCE", at_once)
  rng, items, day = np.random.default_rng(0), 8, config.MICROSECONDS_PER_DAY
  histories = []
  for u in range(9):
    n = int(rng.integers(1, 30))
    time, codes = np.sort(rng.integers(0, 60 * day, n)), rng.integers(0, items + 2, (n, 1)).astype(np.int32)
    histories.append(UserHistory(str(u), time, np.zeros(n, np.int32), codes, np.zeros((n, 0), np.float32), n))

  class Log(OneUser):
    schema = types.SimpleNamespace(field=lambda name: 0, categorical={"item": items + 2})

    def __len__(self) -> int:
      return len(histories)

    def histories(self, users: np.ndarray) -> UserBlock:
      return end_to_end([histories[u] for u in users])

  questions = [Query(0, "0", 0, int(t), 1, 0) for t in (40 * day, 50 * day, histories[2].time[-1], 40 * day) * 6]
  target, seen = rng.integers(0, items + 2, (24, 2)), [rng.integers(0, items + 2, 2) for _ in range(24)]

  def late(history: UserHistory) -> np.ndarray:
    return history.time % 2 == 0

  for hidden, asked in ((None, None), (seen, None), (None, late)):
    found = ranking_baselines.recently_popular(Log(), "item", questions, target, hidden, asked)
    for days in (28, 7, 1):
      for i, question in enumerate(questions):
        counts = np.zeros(items + 2)
        for history in histories:
          for time, (code,) in zip(history.time, history.codes):
            counts[code] += question.time - days * day <= time < question.time and (asked is None or time % 2 == 0)
        out = set() if hidden is None else set(hidden[i])
        order = sorted((c for c in range(2, items + 2) if c not in out), key=lambda c: (-counts[c], c))
        wanted = [order.index(t) + 1 for t in target[i] if t in order]
        assert found[days][i] == min(wanted, default=np.inf)


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
  assert ranking_baselines.personal_ranks(OneUser(), "item", [after_both] * 3, several)[0].tolist() == [1, 3, np.inf]
  assert ranking_baselines.popularity_ranks(several, None).tolist() == [1, 2, np.inf]
  seen = [np.array([2, 4]), np.array([3, 2]), np.array([], int)]
  assert ranking_baselines.popularity_ranks(several, seen).tolist() == [2, 2, np.inf]


def test_each_value_is_predicted_by_its_own_counts_where_all_are_counted(tmp_path: pathlib.Path) -> None:
  write_log(tmp_path)
  raw = raw_config(tmp_path)
  raw["tasks"]["pages"]["top"] = 3  # of the 4 that aggregates count
  cfg = config.resolve(raw)
  prepare.prepare(cfg)
  dataset = Dataset(cfg.data.path)
  models = baselines.AggregateModels(dataset, cfg)
  assert list(models.fitted["pages"]) == ["own counts + logistic"]
  assert models.fitted["pages"]["own counts + logistic"].snapshots > models.fitted["paid"][baselines.TREES].snapshots
  aggregator = dataset.aggregator
  assert aggregator is not None
  columns = models._own_counts("pages", cfg.labelled_tasks["pages"])
  assert columns is not None
  for page, of_page in zip(aggregator.values["page"][1], columns, strict=False):
    read = {aggregator.names[i] for i in of_page}
    assert {n for n in read if n.startswith("page ")} == {f"page {page} {window}" for window in aggregator.windows}
    assert read >= {"recency", "tenure", "moments all", "distinct page"}
  questions = [Query(0, dataset[0]["user"], 0, config.parse_time("2024-05-20", ""), 1, 0)]
  assert models.predictions(questions)["pages"]["own counts + logistic"].shape == (1, 3)
