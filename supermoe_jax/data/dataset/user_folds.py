"""Deals the users of user labels anew into training, validation and test, when their records are read.

A dataset holds one division of the users, by which a record's labels are known or not. With `config.train.user_folds`
a run uses the division of one of several folds instead. Over the folds every user outside of validation is tested
whose label the dataset knows at some snapshot. The dataset is not changed: a record holds a user's label at all of the
user's snapshots, and whether it is known at a snapshot follows from the user's part and the split of the snapshot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from supermoe_jax import config
from supermoe_jax.data.encoding.splits import fold_split


def dealt_record(record: Mapping[str, Any], cfg: config.Config) -> Mapping[str, Any]:
  """Returns the record with the user labels known in the fold of `cfg`; the same record without folds.

  A label is known only at snapshots of the one split that the user belongs to in this fold, so no user is both trained
  on and tested. A user whose label the dataset knows at no snapshot counts as one without a label.
  """
  folds = cfg.train.user_folds
  names = [n for n, t in cfg.labelled_tasks.items() if t.user_column] if folds else []
  if not names:
    return record
  owner = fold_split(record["user"], cfg.data.split, cfg.train.user_fold, folds)
  here = (record["snapshot_split"] == owner).astype(np.uint8)
  known = {f"known_{n}": here if record[f"known_{n}"].any() else np.zeros_like(here) for n in names}
  return {**record, **known}
