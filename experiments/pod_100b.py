"""A hundred billion parameters: 101 million rows of width 1,024 and 32 experts, for 256 chips of v6e or 1,024 of v5p.

    supermoe plan --config experiments/pod_100b.py --topology v6e:16x16
    supermoe plan --config experiments/pod_100b.py --topology v5p:8x8x16 --config.train.batch_rows=65536

All else is as in `pod_1t.py`, but for twice the rows a chip.
"""

import pathlib

import ml_collections

from supermoe_jax.config import read_config


def get_config(files: str = "events/*.parquet") -> ml_collections.ConfigDict:
  config = read_config(f"{pathlib.Path(__file__).with_name('pod_1t.py')}:{files}")
  config.data.path = "runs/pod_100b/dataset"
  fields = config.data.fields
  fields.item.size = fields.item_again.size = 2**24
  fields.query.size = 2**26
  config.model.experts = 32
  config.train.batch_rows = 256 * 64
  return config
