"""A billion parameters: 2.1 million rows of width 512 and 16 experts, for 8 chips and more.

    supermoe plan --config experiments/pod_1b.py --topology v5e:16x16
    supermoe plan --config experiments/pod_1b.py --sweep --topology v5p:2x2x2 v5p:4x4x4 v5p:4x8x8 v5p:8x8x16

The log is that of `pod_1t.py`.
"""

import importlib.util
import pathlib

import ml_collections


def get_config(files: str = "events/*.parquet") -> ml_collections.ConfigDict:
  config = _base(files)
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


def _base(files: str) -> ml_collections.ConfigDict:
  file = pathlib.Path(__file__).with_name("pod_1t.py")
  spec = importlib.util.spec_from_file_location("pod_1t", file)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(files)
