"""Amazon reviews, Beauty or Toys, as sequences of items: the next item, by leave-one-out and full ranking.

The data cannot be shipped; name the folder that holds sequences.txt (a user a line: `user item item …`, oldest first)
and item_attributes.json (`{"item": [attribute, …]}`) after a colon:

    supermoe prepare --config experiments/amazon_beauty.py:FOLDER
    supermoe train --config experiments/amazon_beauty.py:FOLDER --workdir runs/beauty
    supermoe evaluate --workdir runs/beauty

Preparing gives 22,363 users, 198,502 events and 12,101 items of Beauty (Toys: 19,412, 167,597 and 11,924), a test and a
validation snapshot a user and 131,413 (109,361) training snapshots. In test 138 (279) of the items asked for are unseen
in training and count as misses. An item of Beauty has up to 6 of 637 attributes; of Toys' 1,027 some items have up to
31, and 5,054 values of events beyond the sixth are cut off.

Counts of items that follow each other, without training, have test HR@10 .0863 and NDCG@10 .0548 (validation .1051 and
.0680): more than this config.

Beauty, on 2 cores of an AMD EPYC: 25 minutes of training beside other work. Ranked among all items, seen ones left out
(the rows below the first are of versions before this one):

                                     test HR@10  NDCG@10  validation HR@10  NDCG@10
    this config                           .0842    .0506             .1041    .0629  (test HR@5 .0604, NDCG@5 .0429)
    4,500 steps                           .0854    .0500             .1062    .0621
    … and dropout .4                      .0838    .0492             .1040    .0630
    … and 24 snapshots a row              .0829    .0488             .1017    .0611
    … and 5,500 steps                     .0819    .0488
    … and cosines over .05 as scores      .0831    .0475             .1039    .0606
"""

import pathlib

import ml_collections


def get_config(folder: str = "") -> ml_collections.ConfigDict:
  if not folder:
    raise ValueError("name the folder of sequences.txt: --config experiments/amazon_beauty.py:FOLDER")
  files = pathlib.Path(folder).resolve()
  data = {
    "path": f"runs/{files.name}/dataset",
    "sources": {
      "reviews": {
        "files": str(files / "sequences.txt"),
        "user": "user",
        "time": "position",  # there are no times: an item's place in its line takes theirs
        "time_unit": "s",
        "items": {"file": str(files / "item_attributes.json"), "key": "item"},
      },
    },
    "fields": {"item": {}, "attributes": {"column": "values", "many": 6}},
    "split": {"mode": "leave_one_out"},
    "aggregates": {"enabled": False},
  }
  next_item = {
    "kind": "next_event",
    "field": "item",
    "exclude_seen": True,
    "softmax": "sampled",
    "negatives": 1024,
    "sampling": "uniform",
  }
  model = {
    "d_model": 128,
    "layers": 2,
    "heads": 2,
    "d_hidden": 256,
    "experts": 8,
    "d_expert": 128,
    "max_events": 50,
    "dropout": 0.5,
  }
  train = {
    "steps": 7000,
    "batch_rows": 64,
    "snapshots_per_row": 12,
    "packing": True,
    "learning_rate": 1e-3,
    "tables": {"prior_updates": 0.0},  # as measured
    "checkpoint_every": 1000,
    "log_every": 50,
  }
  return ml_collections.ConfigDict({"data": data, "tasks": {"next_item": next_item}, "model": model, "train": train})
