"""The seesaw study on simulated users: tasks in known conflict, and the best score that each of them allows.

    supermoe prepare --config experiments/seesaw_simulated.py
    supermoe seesaw --config experiments/seesaw_simulated.py --workdir runs/seesaw_simulated --jobs 2

The first command simulates 8,000 users into runs/seesaw_simulated/data, unless they are there; another folder can be
named after a colon. Two groups of three binary tasks (a_…, b_…) depend on bits of their own, with labels of all, 30 %
and 5 % of the training users; a regression (c_value) and the next item ask for more. A width of 12 is meant to be too
little for all of them: sharing should cost the tasks with many labels, and help those with few.

The figures in `results/` are of version 0.1.0, in percent of the single-task model's raw score. This version measures
gains by what the single-task model has over a constant answer, lets every model try three learning rates, and adds a
null variant; the study was not run again.
"""

import ml_collections

from supermoe_jax.simulation.latent_users import SimulatedTask, Simulation
from supermoe_jax.simulation.simulator import simulate, simulation_config

# The groups' binary tasks: label rate, relatedness, name.
RATES = ((1.0, 1.0, "full"), (0.3, 0.875, "some"), (0.05, 1.0, "rare"))


def simulation() -> Simulation:
  """What is simulated."""
  tasks = [
    SimulatedTask(f"{letter}_{name}", group, label_rate=rate, relatedness=relatedness)
    for group, letter in enumerate("ab")
    for rate, relatedness, name in RATES
  ]
  tasks.append(SimulatedTask("c_value", 2, "regression", noise=0.3, loss_scale=100.0))
  return Simulation(users=8000, groups=(3, 3, 3), events=(16, 28), tasks=tuple(tasks))


def get_config(folder: str = "runs/seesaw_simulated/data") -> ml_collections.ConfigDict:
  """Simulates into `folder` what is not there yet, and returns the study's config."""
  simulate(simulation(), folder)
  model = {
    "d_model": 12,
    "layers": 2,
    "heads": 2,
    "d_hidden": 32,
    "experts": 8,
    "experts_per_token": 2,
    "d_expert": 16,
    "max_events": 28,
    "dropout": 0.0,
    "view_experts": 4,
    "view_hidden": 8,
  }
  train = {
    "steps": 300,
    "batch_rows": 64,
    "snapshots_per_row": 3,
    "learning_rate": 2e-2,
    "checkpoint_every": 300,
    "weighting": {"method": "equal"},
  }
  # K = 2 experts of d_expert 16 are as many active parameters as a dense block of d_hidden 32 (and a router).
  dense = ("model.moe_every=0", "model.d_hidden=32")
  token = "model.conditioning=token"
  variants = {
    "shared_bottom": dense,
    "gru": ("model.encoder=gru", "model.moe_every=0"),
    "mmoe": (*dense, "model.conditioning=mmoe"),
    "ple": (*dense, "model.conditioning=ple"),
    "moe_equal": (),
    "tuned_static": (),
    "uncertainty": ("train.weighting.method=uncertainty",),
    "famo": ("train.weighting.method=famo",),
    "seesaw": ("train.weighting.method=seesaw",),
    "equal_pulls": ("train.weighting.method=seesaw", "train.weighting.labels_exponent=0.0"),
    "pcgrad": ("train.weighting.method=pcgrad",),
    "cagrad": ("train.weighting.method=cagrad",),
    "token": (token,),
    "token_shuffled": (token, "model.task_ids=shuffled"),
    "missing_negative": ("train.missing=negative",),
    "token_seesaw": (token, "train.weighting.method=seesaw"),
  }
  # A task's reference is the better, on validation, of the same encoder with experts and without.
  single = {"experts": (), "dense": dense}
  seesaw = {"seeds": (0, 1, 2, 3, 4), "variants": variants, "single": single, "tuned": "tuned_static"}
  seesaw |= {"static_candidates": 24, "static_spread": 5.0}
  sections = {**simulation_config(folder), "model": model, "train": train, "seesaw": seesaw}
  return ml_collections.ConfigDict(sections)
