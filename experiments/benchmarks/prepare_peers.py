"""Other libraries' preparation of an event log, as `prepare.py --peers` times it.

    PEERS/bin/python -I experiments/benchmarks/prepare_peers.py {pytorch-lifestream,recbole} FOLDER EVENTS

The interpreter is that of the libraries' own environment, and FOLDER holds what `prepare.py` wrote: log-*.parquet, for
RecBole log/log.inter, and a folder `dataset` for the result. Fails unless all EVENTS are in the result: events a second
say nothing where some were left out.
"""

from __future__ import annotations

import argparse
import pathlib
import pickle
import sys
import types


def lifestream(folder: pathlib.Path) -> int:
  """Writes the records of the users, a dict of tensors for each, and returns the number of their events."""
  # ptls.preprocessing imports its preprocessors for Dask and Spark beside the one for pandas; the release was packed
  # without a folder of the former, and does not ask for pyspark. They are not used here: empty modules stand in.
  for module, name in (("dask", "DaskDataPreprocessor"), ("pyspark", "PysparkDataPreprocessor")):
    stand_in = types.ModuleType(f"ptls.preprocessing.{module}.{module}_preprocessor")
    setattr(stand_in, name, None)
    sys.modules[stand_in.__name__] = stand_in
  import pandas as pd
  from ptls.preprocessing import PandasDataPreprocessor
  from ptls.preprocessing.util import dt_to_timestamp

  log = pd.concat([pd.read_parquet(file) for file in sorted(folder.glob("log-*.parquet"))], ignore_index=True)
  # The preprocessor's own "dt_to_timestamp" gives this function a table of one column, which pandas refuses.
  log["event_time"] = dt_to_timestamp(log.pop("time"))
  preprocessor = PandasDataPreprocessor(
    col_id="user",
    col_event_time="event_time",
    event_time_transformation="none",
    cols_category=["item", "category", "device"],
    cols_numerical=["price"],
    return_records=True,
  )
  records = preprocessor.fit_transform(log)
  with (folder / "dataset" / "records.pickle").open("wb") as file:
    pickle.dump(records, file)
  return sum(len(record["event_time"]) for record in records)


def recbole(folder: pathlib.Path) -> int:
  """Makes the datasets and loaders of a model of sequences, and returns the number of events that they came from."""
  from recbole.config import Config
  from recbole.data import create_dataset, data_preparation

  sys.argv = sys.argv[:1]  # its configuration reads the command line too
  settings = {
    "data_path": str(folder),
    "checkpoint_dir": str(folder / "dataset"),  # where it looks for a dataset of an earlier run
    "TIME_FIELD": "timestamp",
    "load_col": None,  # every field of the log
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
    "train_neg_sample_args": None,  # SASRec's loss is over all items
    "use_gpu": False,
  }
  config = Config(model="SASRec", dataset="log", config_dict=settings)
  dataset = create_dataset(config)
  parts = data_preparation(config, dataset)
  # A sequence for each event with its history before it, which the first event of a user has not; user 0 is padding.
  return sum(len(part.dataset) for part in parts) + dataset.user_num - 1


PEERS = {"pytorch-lifestream": lifestream, "recbole": recbole}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("peer", choices=PEERS)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("events", type=int)
  args = parser.parse_args()
  events = PEERS[args.peer](args.folder)
  if events != args.events:
    raise SystemExit(f"{events:,} of {args.events:,} events are there")


if __name__ == "__main__":
  main()
