"""The simulator: its posterior, its labels, its Bayes scores and its files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from supermoe_jax import config
from supermoe_jax.data.encoding.splits import SPLITS, TRAIN, user_split
from supermoe_jax.errors import DataError, SimulationError
from supermoe_jax.simulation import latent_users, simulator
from supermoe_jax.simulation.latent_users import SimulatedTask, Simulation
from supermoe_jax.simulation.simulator import BayesScore

TASKS = (
  SimulatedTask("full", 0),
  SimulatedTask("some", 0, label_rate=0.3, relatedness=0.75, noise=0.2),
  SimulatedTask("rare", 1, label_rate=0.05),
  SimulatedTask("kind", 1, "multiclass", classes=3),
  SimulatedTask("value", 1, "regression", loss_scale=50.0, noise=0.3),
)
SMALL = Simulation(users=2000, groups=(3, 3), items=24, events=(4, 12), tasks=TASKS)
Drawn = tuple[latent_users.World, latent_users.SimulatedUsers]


@pytest.fixture(scope="module")
def drawn() -> Drawn:
  world = latent_users.build_world(SMALL)
  return world, latent_users.draw_population(SMALL, world)


def _changed(**changes: object) -> Simulation:
  return dataclasses.replace(SMALL, **changes)


# ----------------------------------------------------------------------------------------------------------- posterior


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), items=st.lists(st.integers(0, 4), max_size=6), sharpness=st.floats(0.0, 3.0))
def test_the_posterior_is_the_product_of_the_events_by_brute_force(
  seed: int, items: list[int], sharpness: float
) -> None:
  simulation = Simulation(groups=(3,), items=5, sharpness=sharpness, seed=seed)
  world = latent_users.build_world(simulation)
  by_state = [np.prod([np.exp(world.log_item[g, i]) for i in items]) for g in range(8)]
  found = latent_users.posterior(world.log_item, np.bincount(items, minlength=5)[None].astype(float))
  np.testing.assert_allclose(found[0], np.array(by_state) / np.sum(by_state), rtol=1e-9)


def test_states_are_all_values_of_the_bits_and_items_follow_their_affinity(drawn: Drawn) -> None:
  world, population = drawn
  assert sorted(map(tuple, world.states)) == sorted(itertools.product((0, 1), repeat=6))
  np.testing.assert_allclose(np.exp(world.log_item).sum(axis=1), 1.0)
  state = int(np.argmax(np.bincount(population.state)))
  users = np.flatnonzero(population.state == state)
  item = np.concatenate([population.item[population.offset[u] : population.offset[u + 1]] for u in users])
  expected = np.exp(world.log_item[state])
  share = np.bincount(item, minlength=24) / len(item)
  assert np.all(np.abs(share - expected) < 5 * np.sqrt(expected / len(item)) + 1e-3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_predictive_is_a_distribution_between_those_of_the_states(seed: int) -> None:
  world = latent_users.build_world(Simulation(groups=(3,), items=7, seed=seed))
  counts = np.random.default_rng(seed).integers(0, 3, (4, 7)).astype(float)
  predicted = latent_users.predictive(world.log_item, latent_users.posterior(world.log_item, counts))
  np.testing.assert_allclose(predicted.sum(axis=1), 1.0)
  assert np.all(predicted <= np.exp(world.log_item).max(axis=0) + 1e-12)
  assert np.all(predicted >= np.exp(world.log_item).min(axis=0) - 1e-12)


def test_the_posterior_is_calibrated(drawn: Drawn) -> None:
  world, population = drawn
  belief = latent_users.posterior(world.log_item, latent_users.visible_counts(SMALL, population, SMALL.test))
  of_truth = belief[np.arange(SMALL.users), population.state]
  # The expected probability of the truth is the expected sum of squares, if the posterior is the right one.
  expected = np.sum(belief**2, axis=1)
  assert abs(np.mean(of_truth - expected)) < 4 * np.std(of_truth - expected) / np.sqrt(SMALL.users)


def test_a_snapshot_sees_the_events_before_it_only(drawn: Drawn) -> None:
  _, population = drawn
  counts = latent_users.visible_counts(SMALL, population, 50)
  for u in range(50):
    mine = slice(population.offset[u], population.offset[u + 1])
    before = population.item[mine][population.time[mine] < 50 * config.MICROSECONDS_PER_DAY]
    assert np.array_equal(counts[u], np.bincount(before, minlength=24))
    assert np.all(np.diff(population.time[mine]) > 0)
  assert population.time.min() >= 0
  assert population.time.max() < SMALL.days * config.MICROSECONDS_PER_DAY


# --------------------------------------------------------------------------------------------------------------- tasks


@settings(max_examples=60, deadline=None)
@given(
  seed=st.integers(0, 1000),
  relatedness=st.floats(0.0, 1.0),
  bits=st.integers(3, 5),
  classes=st.integers(2, 4),
)
def test_a_table_agrees_with_its_groups_function_on_the_stated_share(
  seed: int, relatedness: float, bits: int, classes: int
) -> None:
  simulation = Simulation(groups=(3, bits), seed=seed)
  own, related = (
    latent_users.task_table(simulation, SimulatedTask(n, 1, "multiclass", relatedness=r, classes=classes))
    for n, r in (("own", 1.0), ("related", relatedness))
  )
  assert set(own) == set(range(classes))
  assert set(related) <= set(range(classes))
  assert np.sum(own == related) == 2**bits - round((1 - relatedness) * 2**bits)


def test_the_group_function_is_not_linear_and_stays_balanced_when_changed() -> None:
  own = latent_users.task_table(SMALL, TASKS[0])
  bits = (np.arange(8)[:, None] >> np.arange(3)) & 1
  linear = np.linalg.lstsq(np.column_stack([bits, np.ones(8)]), own, rcond=None)[0]
  assert np.abs(np.column_stack([bits, np.ones(8)]) @ linear - own).max() > 0.2
  assert own.sum() == 4
  assert latent_users.task_table(SMALL, TASKS[1]).sum() == 4


def test_tasks_of_different_groups_share_nothing(drawn: Drawn) -> None:
  answer = drawn[0].answer
  for other in (answer["rare"][:, 1], answer["value"]):
    assert np.cov(answer["full"][:, 1], other)[0, 1] == pytest.approx(0, abs=1e-9)
  assert np.corrcoef(answer["full"][:, 1], answer["some"][:, 1])[0, 1] == pytest.approx(0.5)


def test_labels_follow_their_probabilities(drawn: Drawn) -> None:
  world, population = drawn
  for name in ("full", "some", "kind"):
    truth = world.answer[name][population.state]
    wrong = np.mean(truth.argmax(axis=1) != population.label[name])
    noise = next(t.noise for t in TASKS if t.name == name)
    assert abs(wrong - noise) < 4 * np.sqrt(noise / SMALL.users)
  error = population.label["value"] - world.answer["value"][population.state]
  assert np.std(error) == pytest.approx(50 * 0.3, rel=0.1)


def test_label_rates_thin_out_the_labels_of_training_users_only(drawn: Drawn) -> None:
  _, population = drawn
  train = population.split == TRAIN
  for task in TASKS:
    known = population.known[task.name]
    assert known[~train].all()
    spread = np.sqrt(task.label_rate * (1 - task.label_rate) / train.sum())
    assert abs(known[train].mean() - task.label_rate) <= 4 * spread


# -------------------------------------------------------------------------------------------------------- Bayes scores


@pytest.mark.parametrize("split", ["validation", "test"])
def test_no_noisier_posterior_beats_the_bayes_score(drawn: Drawn, split: str) -> None:
  world, population = drawn
  scores = simulator.bayes_scores(SMALL, world, population, split)  # type: ignore[arg-type]
  rng = np.random.default_rng(0)
  day = {"validation": SMALL.validation, "test": SMALL.test}[split]
  counts = latent_users.visible_counts(SMALL, population, day)
  right = latent_users.posterior(world.log_item, counts)
  fewer = latent_users.posterior(world.log_item, rng.binomial(counts.astype(int), 0.5).astype(float))
  blurred = latent_users.posterior(world.log_item + 0.7 * rng.normal(size=world.log_item.shape), counts)
  users = population.split == SPLITS[split]
  for name in ("full", "some", "rare"):
    label = population.label[name][users]

    def area(belief: np.ndarray, name: str = name, label: np.ndarray = label) -> float:
      return float(roc_auc_score(label, belief[users] @ world.answer[name][:, 1]))

    assert area(right) == pytest.approx(scores[name].bayes)
    assert max(area(fewer), area(blurred)) < scores[name].bayes
  told = (population.split == TRAIN) & population.known["value"]
  label, scale = population.label["value"][users], np.std(population.label["value"][told])
  errors = [np.sqrt(np.mean((b[users] @ world.answer["value"] - label) ** 2)) / scale for b in (right, fewer, blurred)]
  assert errors[0] == pytest.approx(scores["value"].bayes)
  assert min(errors[1:]) > scores["value"].bayes
  assert scores["value"].constant == pytest.approx(1.0, abs=0.1)
  assert scores["kind"].bayes > 0.6


def test_bayes_scores_are_what_monte_carlo_expects() -> None:
  # Users, events and labels are drawn anew from the world itself, without `draw`.
  value = dataclasses.replace(TASKS[4], group=0)
  simulation = Simulation(users=20_000, groups=(3,), items=6, events=(6, 6), tasks=(*TASKS[:2], value))
  world = latent_users.build_world(simulation)
  population = latent_users.draw_population(simulation, world)
  scores = simulator.bayes_scores(simulation, world, population, "test")
  rng = np.random.default_rng(1)
  state = rng.integers(0, 8, 60_000)
  visible = rng.binomial(6, simulation.test / simulation.days, len(state))
  state, visible = state[visible > 0], visible[visible > 0]
  counts = np.array([rng.multinomial(n, np.exp(world.log_item[g])) for n, g in zip(visible, state)], float)
  belief = latent_users.posterior(world.log_item, counts)
  for name in ("full", "some"):
    label = rng.random(len(state)) < world.answer[name][state, 1]
    assert roc_auc_score(label, belief @ world.answer[name][:, 1]) == pytest.approx(scores[name].bayes, abs=0.03)
  value = world.answer["value"][state] + 15 * rng.normal(size=len(state))
  error = np.sqrt(np.mean((belief @ world.answer["value"] - value) ** 2)) / value.std()
  assert error == pytest.approx(scores["value"].bayes, abs=0.03)
  following = np.array([rng.choice(6, p=np.exp(world.log_item[g])) for g in state[:20_000]])
  ranked = simulator.ndcg(latent_users.predictive(world.log_item, belief[:20_000]), following)
  assert ranked == pytest.approx(scores["next_item"].bayes, abs=0.01)


def test_a_scale_of_the_loss_changes_no_score_and_no_event(drawn: Drawn) -> None:
  scaled = _changed(tasks=(*TASKS[:4], dataclasses.replace(TASKS[4], loss_scale=1.0)))
  world = latent_users.build_world(scaled)
  population = latent_users.draw_population(scaled, world)
  assert np.array_equal(population.item, drawn[1].item)
  np.testing.assert_allclose(population.label["value"] * 50, drawn[1].label["value"])
  mine, other = (
    simulator.bayes_scores(s, *d, "test")["value"] for s, d in ((scaled, (world, population)), (SMALL, drawn))
  )
  assert mine.bayes == pytest.approx(other.bayes)


def test_a_share_is_zero_at_the_constant_and_one_at_bayes() -> None:
  for score in (BayesScore("auc", 0.9, 0.5, 10), BayesScore("rmse", 0.4, 1.0, 10)):
    assert score.share(score.constant) == 0
    assert score.share(score.bayes) == 1
    assert 0 < score.share((score.bayes + score.constant) / 2) < 1


# --------------------------------------------------------------------------------------------------------------- files


def test_files_say_what_was_drawn(tmp_path: pathlib.Path, drawn: Drawn) -> None:
  world, population = drawn
  simulated = simulator.simulate(SMALL, tmp_path / "sim")
  assert sorted(p.name for p in (tmp_path / "sim").iterdir()) == sorted(simulator.FILES)
  events, users, truth = (pq.read_table(tmp_path / "sim" / f"{n}.parquet") for n in ("events", "users", "truth"))
  assert events["item"].to_pylist() == [f"i{i}" for i in population.item]
  assert events["user"][0].as_py() == population.user_id[0]
  assert users["rare"].null_count == np.sum(~population.known["rare"])
  some = int(np.flatnonzero(population.known["rare"])[0])
  assert users["rare"][some].as_py() == population.label["rare"][some]
  assert truth["bits"][3].as_py() == world.states[population.state[3]].tolist()
  assert truth["full"][3].as_py() == world.answer["full"][population.state[3], 1]
  assert simulated.bayes["test"] == simulator.bayes_scores(SMALL, world, population, "test")
  possible = json.loads((tmp_path / "sim" / "possible.json").read_text())
  assert possible["full"]["bayes"] == simulated.bayes["test"]["full"].bayes


def test_one_seed_gives_one_simulation(tmp_path: pathlib.Path) -> None:
  small = _changed(users=300)
  for name, simulation in (("a", small), ("b", small), ("c", dataclasses.replace(small, seed=1))):
    simulator.simulate(simulation, tmp_path / name)
  for name in simulator.FILES:
    a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
    assert a == b
    assert a != c


def test_what_is_there_is_read_and_other_settings_are_refused(tmp_path: pathlib.Path) -> None:
  small, folder = _changed(users=300), tmp_path / "sim"
  first = simulator.simulate(small, folder)
  before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
  assert simulator.simulate(small, folder) == first
  assert simulator.read_simulation(folder).simulation == small
  with pytest.raises(DataError, match=r"simulation\.seed: 0 → 7"):
    simulator.simulate(dataclasses.replace(small, seed=7), folder)
  assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_foreign_and_damaged_folders_are_refused(tmp_path: pathlib.Path) -> None:
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(DataError, match=r"events\.parquet is missing"):
    simulator.simulate(SMALL, tmp_path)
  with pytest.raises(DataError, match="is a file"):
    simulator.simulate(SMALL, tmp_path / "notes.txt")
  assert (tmp_path / "notes.txt").read_text() == "mine"
  assert len(list(tmp_path.iterdir())) == 1


def test_nothing_is_left_where_writing_fails(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  def fail(*unused: object) -> None:
    raise OSError("the disk is full")

  monkeypatch.setattr(simulator, "_truth", fail)
  with pytest.raises(OSError, match="disk is full"):
    simulator.simulate(_changed(users=300), tmp_path / "sim")
  assert not list(tmp_path.iterdir())


def test_the_config_of_a_simulation_is_valid_and_splits_users_alike(tmp_path: pathlib.Path, drawn: Drawn) -> None:
  folder = tmp_path / "sim"
  simulator.simulate(SMALL, folder)
  cfg = config.resolve(simulator.simulation_config(folder))
  assert list(cfg.tasks) == [*(t.name for t in TASKS), "next_item"]
  assert [cfg.tasks[n].answer for n in ("full", "kind", "value")] == ["binary", "multiclass", "regression"]
  split = [user_split(u, cfg.data.split) for u in drawn[1].user_id]
  assert split == drawn[1].split.tolist()
  start, end = config.parse_time("2021-01-01", ""), config.parse_time(cfg.data.split.log_end, "")
  assert (end - start) / config.MICROSECONDS_PER_DAY == SMALL.days


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"groups": (2,)}, "at least 3 bits"),
    ({"groups": (7, 6)}, "13 bits"),
    ({"events": (0, 5)}, r"events=\(0, 5\)"),
    ({"test": 100}, "train_start"),
    ({"tasks": (TASKS[0], TASKS[0])}, "appears twice"),
    ({"tasks": (SimulatedTask("next_item"),)}, "next_item"),
    ({"tasks": (SimulatedTask("a", group=2),)}, "group=2"),
    ({"tasks": (SimulatedTask("a", label_rate=0.0),)}, "label_rate=0"),
    ({"tasks": (SimulatedTask("a", relatedness=1.5),)}, r"relatedness=1\.5"),
    ({"tasks": (SimulatedTask("a", noise=0.5),)}, r"noise=0\.5"),
    ({"tasks": (SimulatedTask("a", loss_scale=2.0),)}, r"loss_scale=2\.0"),
    ({"tasks": (SimulatedTask("a", form="multiclass", classes=5),)}, "classes=5"),
  ],
)
def test_settings_that_describe_no_simulation_are_refused(changes: dict[str, object], named: str) -> None:
  with pytest.raises(SimulationError, match=named):
    latent_users.build_world(_changed(**changes))


def test_too_few_users_to_score_are_an_error() -> None:
  few = _changed(users=3)
  world = latent_users.build_world(few)
  with pytest.raises(SimulationError, match="simulate more users"):
    simulator.bayes_scores(few, world, latent_users.draw_population(few, world), "test")
