"""The plan that tests of studies share."""

from __future__ import annotations

import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from tests.fixtures.seesaw_plans import SMALL


@pytest.fixture(scope="module")
def planned(cfg: config.Config, dataset: Dataset) -> config.Config:
  """Two tasks, two seeds, two variants."""
  small = config.override(cfg, SMALL)
  raw = config.to_dict(small)
  raw["seesaw"] = {
    "seeds": [0, 1],
    "variants": {"tuned_static": [], "dense": ["model.moe_every=0", "train.weighting.method=equal"]},
    "static_candidates": 2,
    "rates": [1.0],
    "null": False,
  }
  return config.resolve(raw)
