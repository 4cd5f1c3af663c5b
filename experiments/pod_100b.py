"""A hundred billion parameters: 101 million rows of width 1,024 and 32 experts, for 256 chips of v6e or 1,024 of v5p.

    supermoe plan --config experiments/pod_100b.py --topology v6e:16x16
    supermoe plan --config experiments/pod_100b.py --topology v5p:8x8x16 --config.train.batch_rows=65536

All else is as in `pod_1t.py`, but for twice the rows a chip.
"""

import importlib.util
import pathlib

import ml_collections


def get_config(files: str = "events/*.parquet") -> ml_collections.ConfigDict:
  config = _base(files)
  config.data.path = "runs/pod_100b/dataset"
  fields = config.data.fields
  fields.item.size = fields.item_again.size = 2**24
  fields.query.size = 2**26
  config.model.experts = 32
  config.train.batch_rows = 256 * 64
  return config


def _base(files: str) -> ml_collections.ConfigDict:
  file = pathlib.Path(__file__).with_name("pod_1t.py")
  spec = importlib.util.spec_from_file_location("pod_1t", file)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(files)
