"""Counts, before the first step, what the heads of next-event tasks remember of the training period."""

from __future__ import annotations

import dataclasses
import logging
from typing import cast

import jax.numpy as jnp

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.followers import followers
from supermoe_jax.data.dataset.pair_counts import DECAY
from supermoe_jax.distributed import processes
from supermoe_jax.layers.memory.head_memory import FOLLOWERS, FollowRows, FollowRule

logger = processes.first_process_only(logging.getLogger(__name__))


def count_followers(dataset: Dataset, cfg: config.Config) -> dict[str, FollowRows]:
  """Returns the followers of each value, for the active tasks whose `memory` names "follow".

  How pairs are counted is tuned by the validation questions, where there are any. Every process counts the same.
  """
  out = {}
  for name, task in cfg.active_views.items():
    if task.answer != "catalogue" or "follow" not in (asked := cast(config.NextEvent, task)).memory:
      continue
    found = followers(dataset, cfg, name, asked, FOLLOWERS)
    setting = found.setting
    rule = FollowRule(
      DECAY,
      setting.window,
      setting.backward,
      setting.fade,
      setting.last,
      asked.values_of_a_moment(dataset.tie_rate, cfg.data.split.mode) > 0,
    )
    out[name] = FollowRows(
      jnp.asarray(found.code), jnp.asarray(found.number), jnp.asarray(found.out), jnp.asarray(found.into), rule
    )
    told = ", ".join(f"{k} {v:g}" for k, v in dataclasses.asdict(setting).items())
    share = float((found.code[2:, 0] > 0).mean())
    logger.info(
      f"task {name} remembers followers of {share:.1%} of {len(found.code) - 2:,} values, from {found.pairs:,} pairs "
      f"of {found.users:,} of {len(dataset):,} users ({told})"
    )
  return out
