"""What becomes of a prepared dataset in which a byte has changed, or of which the end is missing?

    python experiments/benchmarks/corruption.py runs/complete_journey/dataset [--trials 1000] [--json FILE]

Each trial takes a copy of the dataset, picks a kind of file and one of that kind, changes one byte of it or cuts it at
a random place, then opens the dataset and reads every record. There must be a `DataError`, or else all that is read
must be what was written (many bytes of a shard are padding, and the table of users is read once users were appended).
Exit code 1 if anything else happens even once.

ArrayRecord guards the content of shards by checksums, and says so only when the record is read, Parquet the table
of users; the manifest holds digests of everything else. A dataset of few users makes trials fast: every one reads it
all.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import random
import shutil
import tempfile
from typing import Any

import numpy as np
from tqdm import tqdm

from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.errors import DataError


def content(path: pathlib.Path) -> list[Any]:
  """All that a run reads of a dataset, comparable by `same`."""
  dataset = Dataset(path)
  return [dataset.manifest, dataset.encoders, dataset.schema, *(dataset[i] for i in range(len(dataset)))]


def same(a: Any, b: Any) -> bool:
  """Whether two contents are equal to the last bit."""
  if isinstance(a, np.ndarray):
    return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
  if isinstance(a, dict):
    return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
  if isinstance(a, list | tuple):
    return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
  if hasattr(a, "__dict__") and type(a) is type(b):
    return same(vars(a), vars(b))
  return bool(a == b)


def damage(file: pathlib.Path, rng: random.Random) -> str:
  """Changes one byte of a file, or cuts it; returns which."""
  data = bytearray(file.read_bytes())
  place = rng.randrange(len(data))
  if rng.random() < 0.2:
    file.write_bytes(data[:place])
    return "cut"
  data[place] ^= rng.randrange(1, 256)
  file.write_bytes(data)
  return "byte changed"


def kind_of(file: pathlib.Path) -> str:
  """Which kind of a dataset's files it is."""
  if ".array_record" in file.name:
    return "shard"
  return {"manifest.json": "manifest", "users.parquet": "users"}.get(str(file), "other file")


def trials(dataset: pathlib.Path, n: int, seed: int = 0) -> collections.Counter[tuple[str, str, str]]:
  """Damages copies of a dataset n times; counts by (kind of file, damage, what came of it).

  What came of it is `error`, `unchanged`, or, which must not be, `wrong` or the name of an exception that is no
  DataError.
  """
  rng, found = random.Random(seed), collections.Counter[tuple[str, str, str]]()
  written = content(dataset)
  files = collections.defaultdict(list)
  for file in sorted(f.relative_to(dataset) for f in dataset.rglob("*") if f.is_file()):
    files[kind_of(file)].append(file)
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder) / "dataset"
    shutil.copytree(dataset, copy)
    for _ in tqdm(range(n), desc="damaging", unit=" trials", mininterval=1):
      kind = rng.choice(list(files))
      name = rng.choice(files[kind])
      what = damage(copy / name, rng)
      try:
        outcome = "unchanged" if same(content(copy), written) else "wrong"
      except DataError:
        outcome = "error"
      except Exception as error:
        outcome = type(error).__name__
      found[kind, what, outcome] += 1
      shutil.copyfile(dataset / name, copy / name)
  return found


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("dataset", type=pathlib.Path)
  parser.add_argument("--trials", type=int, default=1000)
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args()
  found = trials(args.dataset, args.trials)
  for (kind, what, outcome), n in sorted(found.items()):
    print(f"{kind:<12} {what:<13} {outcome:<12} {n:>6,}")
  bad = sum(n for (_, _, outcome), n in found.items() if outcome not in ("error", "unchanged"))
  print(f"{args.trials:,} trials, {bad} neither noticed nor harmless")
  if args.json:
    rows = [{"file": k, "damage": w, "outcome": o, "trials": n} for (k, w, o), n in sorted(found.items())]
    args.json.write_text(json.dumps({"trials": args.trials, "bad": bad, "rows": rows}, indent=1) + "\n")
  return int(bad > 0)


if __name__ == "__main__":
  raise SystemExit(main())
