"""How fast are users embedded, in how much memory, and does a command that is killed end as one that is not?

    python experiments/benchmarks/embed.py [--users 100000 1000000] [--kills 10] [--folder DIR] [--json FILE]

Generates users of 20 to 100 events (60 on average) with the fields of the Complete Journey's log, prepares them and
trains the quickstart's model for two steps: what it costs does not depend on what it has learned. Then `supermoe embed
--as-of now` runs as a process of its own: users a second, the share of its time in which it waited for the encoder, the
most memory that was resident. With --kills the last of the logs is embedded again, by a command that is killed with
SIGKILL so many times at random moments and given again; every row must be the same. Exit code 1 if one is not.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import duckdb
from prepare import watched

from supermoe_jax.embeddings import embedding_files

DAYS = 300
QUICKSTART = pathlib.Path(__file__).parent.parent / "complete_journey.py"


def generate(folder: pathlib.Path, users: int) -> int:
  """Writes the purchases and redemptions of so many users; returns how many events there are."""
  con = duckdb.connect()
  con.execute(f"SET threads = 2; SET memory_limit = '3GB'; SET temp_directory = '{folder / 'spilled'}'")
  # Hashes are the random numbers; a power of a draw in [0, 1) makes some values frequent.
  con.execute(
    "CREATE TEMP VIEW drawn AS SELECT u, hash(u * 1000 + k) AS h, (hash(u * 1000 + k, 1) % 1000003) / 1000003.0 AS x "
    f"FROM range({users}) t(u), range(100) s(k) WHERE k < 20 + hash(u) % 81"
  )
  moment = f"TIMESTAMP '2024-01-01' + to_seconds((h % {DAYS * 86400})::BIGINT)"
  con.execute(
    f"COPY (SELECT u AS household_id, {moment} AS transaction_timestamp, floor(pow(x, 2) * 90000)::BIGINT AS "
    "product_id, 'category ' || floor(pow(x, 2) * 300)::BIGINT AS product_category, 'type ' || floor(pow(x, 2) * "
    "2000)::BIGINT AS product_type, 'department ' || floor(pow(x, 2) * 30)::BIGINT AS department, CASE h % 4 WHEN 0 "
    "THEN 'Private' ELSE 'National' END AS brand, (h // 7) % 400 AS store_id, 1 + (h // 11) % 5 AS quantity, "
    "round(exp((h // 13) % 400 / 100.0), 2) AS sales_value, ((h // 17) % 300) / 100.0 AS retail_disc FROM drawn) "
    f"TO '{folder / 'buys.parquet'}'"
  )
  con.execute(
    f"COPY (SELECT u AS household_id, {moment} AS redemption_date FROM drawn WHERE h % 53 = 0) "
    f"TO '{folder / 'coupons.parquet'}'"
  )
  ((events,),) = con.execute("SELECT count(*) FROM drawn").fetchall()
  return int(events)


CONFIG = '''
import runpy

import ml_collections


def get_config():
  """The quickstart's model over a generated log."""
  raw = runpy.run_path({quickstart!r})["get_config"]().to_dict()
  data, purchases = raw["data"], raw["data"]["sources"]["purchases"]
  del data["users"], purchases["items"]
  data["path"], purchases["files"] = {path!r}, {buys!r}
  data["sources"]["redemptions"]["files"] = {coupons!r}
  data["split"] = {{
    "train_end": "2024-08-01", "every_days": 60.0, "validation": ("2024-08-01",), "test": ("2024-09-01",)
  }}
  raw["tasks"] = {{name: task for name, task in raw["tasks"].items() if not name.startswith("demo_")}}
  raw["train"] |= {{"steps": 2, "warmup_steps": 1, "checkpoint_every": 2}}
  return ml_collections.ConfigDict(raw)
'''


def supermoe(*arguments: str) -> tuple[float, int]:
  """Runs a verb; returns its seconds and the most bytes that were resident."""
  code, seconds, peak = watched([sys.executable, "-m", "supermoe_jax", *arguments])
  if code:
    raise SystemExit(f"supermoe {arguments[0]} ended with code {code}")
  return seconds, peak


def trained(folder: pathlib.Path, users: int) -> pathlib.Path:
  """Makes a run over so many generated users."""
  folder.mkdir()
  events = generate(folder, users)
  print(f"{users:,} users, {events:,} events")
  file, names = folder / "config.py", {"buys": "buys.parquet", "coupons": "coupons.parquet", "path": "dataset"}
  paths = {key: str(folder / name) for key, name in names.items()}
  file.write_text(CONFIG.format(quickstart=str(QUICKSTART.resolve()), **paths))
  supermoe("prepare", "--config", str(file))
  supermoe("train", "--config", str(file), "--workdir", str(folder / "run"))
  return folder / "run"


def measure(run: pathlib.Path, users: int) -> dict[str, Any]:
  """Embeds all users of a run once."""
  seconds, peak = supermoe("embed", "--workdir", str(run), "--as-of", "now")
  took = embedding_files.read_embedding_manifest(run / "embeddings")["seconds"]
  return {
    "users": users, "seconds": seconds, "users_per_second": users / took["whole"], "peak": peak, **took,
    "in_encoder": took["encoding"] / took["whole"],
  }  # fmt: skip


def killed(run: pathlib.Path, times: int, seconds: float, seed: int) -> dict[str, Any]:
  """Embeds again, killed so many times, and compares."""
  rng, out = random.Random(seed), run.parent / "killed"
  command = [sys.executable, "-m", "supermoe_jax", "embed", "--workdir", str(run), "--as-of", "now", "--out", str(out)]
  quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
  moments = []
  for _ in range(times):
    with subprocess.Popen(command, **quiet) as process:
      time.sleep(rng.uniform(0, 2 * seconds / times))
      process.kill()
    if process.returncode != -9:
      break  # it was through
    moments.append(len(list(out.with_name("killed.incomplete").glob("part-*.parquet"))))
    print(f"killed with {moments[-1]} parts written")
  if not out.exists():
    supermoe(*command[3:])
  parts = zip(embedding_files.part_paths(run / "embeddings"), embedding_files.part_paths(out), strict=True)
  return {
    "kills": len(moments),
    "parts_at_kills": moments,
    "same": all(a.read_bytes() == b.read_bytes() for a, b in parts),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--users", type=int, nargs="+", default=[100_000, 1_000_000])
  parser.add_argument("--kills", type=int, default=0)
  parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
  parser.add_argument("--folder", type=pathlib.Path, help="where the logs go, and stay; default: a temporary folder")
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    folder = (args.folder or pathlib.Path(temporary)).resolve()
    rows, run = [], folder
    for users in args.users:
      run = folder / str(users) / "run"
      if not (run / "checkpoints").is_dir():
        run = trained(folder / str(users), users)
      shutil.rmtree(run / "embeddings", ignore_errors=True)
      rows.append(measure(run, users))
    print("    users  seconds  users/s  in encoder  compiling     peak")
    for row in rows:
      print(
        f"{row['users']:>9,} {row['seconds']:>8.1f} {row['users_per_second']:>8,.0f} {row['in_encoder']:>11.1%} "
        f"{row['compiling']:>8.1f} s {row['peak'] / 2**20:>5,.0f} MiB"
      )
    cut = killed(run, args.kills, rows[-1]["seconds"], args.seed) if args.kills else None
    if cut:
      print(f"killed {cut['kills']} times: {'the same' if cut['same'] else 'NOT THE SAME'}")
  if args.json:
    args.json.write_text(json.dumps({"rows": rows, "killed": cut}, indent=1) + "\n")
  if cut and not cut["same"]:
    raise SystemExit(1)


if __name__ == "__main__":
  main()
