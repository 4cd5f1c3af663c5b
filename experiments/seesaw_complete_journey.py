"""The seesaw study on the Complete Journey retail data: nine tasks, a shortened configuration, three seeds.

supermoe prepare --config experiments/seesaw_complete_journey.py
supermoe seesaw --config experiments/seesaw_complete_journey.py --workdir runs/seesaw_complete_journey --jobs 2

Version 0.1.0 did 75 runs in 40 minutes on 2 cores of an Intel Xeon, beside other work. Its figures, in percent of the
single-task model's raw score: on validation `gate` was best, which that version's complete_journey.py had; it lost
significantly on no task, mean gain +0.2 % (-2.1 to +2.5). Equal weights lost 4 % on the categories and 9 % on the next
category. `results/` has all. This version measures gains by what the single-task model has over a constant answer, lets
every model try three learning rates, adds a null variant, and lets each seed test another fold of the households; the
study was not run again.
"""

import pathlib

import ml_collections

from supermoe_jax.config import read_config


def get_config() -> ml_collections.ConfigDict:
  config = read_config(str(pathlib.Path(__file__).with_name("complete_journey.py")))
  config.model.max_events = 32
  config.train.steps = 320
  config.train.checkpoint_every = 320
  # K = 2 experts of d_expert 128 are as many active parameters as a dense block of d_hidden 256 (and a router).
  dense = ("model.moe_every=0", "model.d_hidden=256")
  equal = ("train.weighting.method=equal",)
  config.seesaw = {
    "seeds": (0, 1, 2),
    "variants": {
      "shared_bottom": (*dense, *equal),
      "mmoe": (*dense, *equal, "model.conditioning=mmoe"),
      "ple": (*dense, *equal, "model.conditioning=ple"),
      "moe_equal": equal,
      "static": (),  # the weights of complete_journey.py
      "tuned_static": (),
      "seesaw": ("train.weighting.method=seesaw",),
      "token": ("model.conditioning=token",),
    },
    "static_candidates": 5,
  }
  return config
