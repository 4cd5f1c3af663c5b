"""Does the future leak into an embedding? Appends events at and after τ to every user's history and embeds again.

    python experiments/benchmarks/leakage.py runs/quickstart --as-of 2017-11-01 [--json FILE]

Every user's record loses its real events at or after τ and gets random others: any value, from τ on. The embeddings as
of τ must not change by a single bit. Exit code 1 if one does.
"""

import argparse
import json
import pathlib

import numpy as np

from supermoe_jax import config
from supermoe_jax.data.dataset import snapshot_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.training.run import Run


class OtherFuture(Dataset):
  """The dataset with another future: events at or after τ replaced by up to 50 random ones."""

  def __init__(self, path: pathlib.Path, time: int):
    super().__init__(path)
    self._time = time

  def __getitem__(self, index: int) -> dict:
    record = super().__getitem__(index)
    rng = np.random.default_rng(index)
    past = int(np.searchsorted(record["time"], self._time, side="left"))
    n = int(rng.integers(1, 51))
    later = self._time + np.sort(rng.integers(0, 30 * config.MICROSECONDS_PER_DAY, n))
    later[0] = self._time  # an event at τ itself is not before τ
    record["time"] = np.append(record["time"][:past], later)
    record["source"] = np.append(record["source"][:past], rng.integers(0, len(self.schema.sources), n).astype(np.int32))
    if "codes" in record:
      sizes = [self.schema.categorical[name] for name in (*self.schema.categorical, *self.schema.further)]
      codes = rng.integers(0, sizes, (n, len(sizes)))
      record["codes"] = np.concatenate([record["codes"][:past], codes.astype(np.int32)])
    if "numeric" in record:
      numeric = rng.normal(scale=100, size=(n, len(self.schema.numeric)))
      record["numeric"] = np.concatenate([record["numeric"][:past], numeric.astype(np.float32)])
    return record


def vectors(run: Run, time: int) -> dict[str, bytes]:
  out = {}
  for batch in snapshot_batches.query_batches(run.dataset, run.cfg, times=[time]):
    for question, z in zip(batch.questions, np.asarray(run.answer(batch.features).z)):
      out[question.user_id] = z.tobytes()
  return out


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("workdir", type=pathlib.Path)
  parser.add_argument("--as-of", required=True)
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args()
  time = config.parse_time(args.as_of, "--as-of")
  run = Run(args.workdir)
  before = vectors(run, time)
  run.dataset = OtherFuture(run.dataset.path, time)
  after = vectors(run, time)
  changed = sum(after.get(user) != vector for user, vector in before.items())
  print(f"{len(before):,} embeddings as of {args.as_of}, another future for every user: {changed} changed")
  if args.json:
    args.json.write_text(json.dumps({"as_of": args.as_of, "embeddings": len(before), "changed": changed}) + "\n")
  return int(changed > 0 or before.keys() != after.keys())


if __name__ == "__main__":
  raise SystemExit(main())
