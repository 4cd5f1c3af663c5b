"""A next-event head with a memory: it starts on the floor of the counts, resumes, and says its gains."""

import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import config, device_mesh
from supermoe_jax.data.dataset import snapshot_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.followers import followers
from supermoe_jax.data.dataset.pair_counts import FollowCounts
from supermoe_jax.data.encoding.splits import TEST
from supermoe_jax.data.tasks.labels import right_values
from supermoe_jax.errors import ConfigError
from supermoe_jax.evaluation import evaluate
from supermoe_jax.evaluation.ranking import QuestionRanks
from supermoe_jax.layers.memory.head_memory import FOLLOWERS, MemoryRows
from supermoe_jax.training import loop
from supermoe_jax.training.checkpoints.checkpoint import RestoredModel
from supermoe_jax.training.memory_counts import count_followers
from supermoe_jax.training.run import Run
from supermoe_jax.training.step import create_state
from tests.fixtures.short_runs import cut_and_resumed, short


def remembering(cfg: config.Config, *kinds: str) -> config.Config:
  return config.override(short(cfg), [f"--config.tasks.next_page.memory={kinds}"])


@pytest.fixture(scope="module")
def trained(cfg: config.Config, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("memory")
  loop.train(remembering(cfg, "repeat", "recent", "follow"), folder / "run")
  return folder / "run"


def test_a_new_head_ranks_as_the_counts_do(cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path) -> None:
  """The best rank of several right values depends on nothing but what followed the last values."""
  cfg = remembering(cfg, "follow")
  mesh = device_mesh.make_mesh(cfg.train.mesh)
  rows = count_followers(dataset, cfg)
  graph, state = create_state(cfg, dataset.schema, mesh, None, rows)
  run = Run.of(tmp_path, cfg, dataset, mesh, graph, RestoredModel(0, state.model, {}))
  ranks, questions, target, there = QuestionRanks(run, "next_page"), [], [], []
  for batch in snapshot_batches.query_batches(dataset, cfg, split=TEST):
    out = run.answer(batch.features, batch.given)
    right = right_values(batch.labels["next_page"], batch.also["next_page"])
    ranks.add(np.asarray(out.answers["next_page"])[: len(right)], right, None, out.remembered["next_page"])
    questions += batch.questions
    target.append(right)
    there.append((right >= 2).any(axis=1))
  asked = cfg.active_views["next_page"]
  simultaneous = asked.values_of_a_moment(dataset.tie_rate, cfg.data.split.mode) > 0
  counts = FollowCounts(dataset, "page", simultaneous=simultaneous)
  counts.setting = followers(dataset, cfg, "next_page", asked, FOLLOWERS).setting
  kept = np.concatenate(there)
  wanted = counts.ranks(questions, np.concatenate(target))[kept]
  # Values without a count tie: the head ranks them behind, the baseline by their frequency.
  assert kept.sum() > 20 and np.mean(ranks.ranks()[kept] == wanted) > 0.9


def test_a_cut_run_ends_bitwise_alike_and_never_changes_its_counts(
  cfg: config.Config, dataset: Dataset, trained: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  cfg = remembering(cfg, "repeat", "recent", "follow")
  cut_and_resumed(cfg, trained, tmp_path / "twice", after=6)
  rows = count_followers(dataset, cfg)
  _, state = create_state(cfg, dataset.schema, device_mesh.make_mesh(cfg.train.mesh), None, rows)
  before, after = (jax.tree.leaves(nnx.filter_state(m, MemoryRows)) for m in (state.model, Run(trained).variables))
  assert len(before) == 2 and max(np.abs(np.asarray(x)).max() for x in before) > 1
  for a, b in zip(before, after, strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_run_says_its_gains_and_answers_alike_on_other_devices(trained: pathlib.Path) -> None:
  found = evaluate.evaluate(Run(trained), progress=False)
  assert json.loads((trained / "evaluation.json").read_text())["splits"] == json.loads(json.dumps(found["splits"]))
  memory = found["splits"]["test"]["next_page"]["memory"]
  assert list(memory) == ["repeat", "recent", "follow"]
  assert all(0.5 < of["gain"] < 2 and of["spread"] >= 0 for of in memory.values())  # eight steps from 1
  run = Run(trained)
  batch = next(iter(snapshot_batches.query_batches(run.dataset, run.cfg, split=TEST)))
  alone = run.answer(batch.features, batch.given)
  other = config.override(run.cfg, ["--config.train.mesh.data=2", "--config.train.mesh.tensor=4"])
  kept = RestoredModel(run.step, jax.device_get(run.variables), run.statistics)
  again = Run.of(trained, other, run.dataset, device_mesh.make_mesh(other.train.mesh), run.graph, kept)
  spread = again.answer(batch.features, batch.given)
  for a, b in zip(jax.tree.leaves(alone.remembered), jax.tree.leaves(spread.remembered), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  np.testing.assert_allclose(alone.answers["next_page"], spread.answers["next_page"], atol=1e-4)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (["memory=('follow', 'repeats')"], r"'repeats' is no kind of memory; did you mean 'repeat'"),
    (["memory=('follow', 'follow')"], "names a kind twice"),
    (["memory=('follow',)", "where='page == \"a\"'"], "leave one of the two out"),
  ],
)
def test_memories_that_cannot_be_are_refused(cfg: config.Config, settings: list[str], message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    config.override(cfg, [f"--config.tasks.next_page.{s}" for s in settings])
