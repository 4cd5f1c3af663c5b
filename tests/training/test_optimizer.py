"""The learning rate over a run, and which parameters decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.training import optimizer

TRAIN = config.Train(steps=100, warmup_steps=10, learning_rate=0.4, final_learning_rate=0.1)


def test_the_learning_rate_rises_to_its_peak_and_falls_until_the_last_step() -> None:
  rate = optimizer.schedule(TRAIN)
  assert [float(rate(step)) for step in (0, 5, 10, 55, 100)] == pytest.approx([0, 0.2, 0.4, 0.22, 0.04])


def test_only_matrices_of_maps_and_experts_decay_and_by_rate_and_decay() -> None:
  kept = {"norm": {"scale": jnp.ones(2)}, "lin": {"bias": jnp.ones(2)}, "task_vectors": jnp.ones((2, 2))}
  decayed = {"lin": {"kernel": jnp.ones((2, 2))}, "moe": {n: jnp.ones((2, 2)) for n in ("up", "gate", "down")}}
  params = {"kept": kept, "decayed": decayed}
  adamw = optimizer.make_optimizer(config.Train(steps=100, warmup_steps=0, learning_rate=0.4, weight_decay=0.1))
  updates, _ = adamw.update(jax.tree.map(jnp.zeros_like, params), adamw.init(params), params)
  assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(updates["kept"]))
  for leaf in jax.tree.leaves(updates["decayed"]):
    np.testing.assert_allclose(leaf, -0.04, rtol=1e-6)
