"""A billion parameters: 2.1 million rows of width 512 and 16 experts, for 8 chips and more.

    supermoe plan --config experiments/pod_1b.py --topology v5e:16x16
    supermoe plan --config experiments/pod_1b.py --sweep --topology v5p:2x2x2 v5p:4x4x4 v5p:4x8x8 v5p:8x8x16

The log is that of `pod_1t.py`.
"""

import pathlib

import ml_collections

from supermoe_jax.config import read_config


def get_config(files: str = "events/*.parquet") -> ml_collections.ConfigDict:
  config = read_config(f"{pathlib.Path(__file__).with_name('pod_1t.py')}:{files}")
  config.data.path = "runs/pod_1b/dataset"
  fields = config.data.fields
  fields.item.size = fields.item_again.size = 2**19
  fields.query.size = 2**20
  fields.category.size = 20_000
  config.tasks.next_category.negatives = 2048
  config.model.update(
    {"d_model": 512, "layers": 4, "heads": 8, "d_hidden": 2048, "experts": 16, "d_expert": 1024, "max_events": 248}
  )
  config.train.batch_rows = 256 * 64
  config.train.mesh = {"data": 64, "expert": 4}
  return config
