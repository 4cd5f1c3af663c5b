"""How fast is an event log prepared, and in how much memory?

    python experiments/benchmarks/prepare.py [--events 3000000 30000000] [--memory 4GB] [--folder DIR] [--json FILE]

Generates Parquet logs of 30 events a user on average: as many items as users, their frequencies falling as a power
law, and four fields (item, category, price, device). Then times `supermoe prepare` as a process of its own, from the
files to the dataset directory: events a second, and the most memory that the process and its children held at once.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import duckdb

EVENTS_PER_USER = 30
DAYS = 180
PARTS = 8

CONFIG = '''"""The generated log of {events:,} events."""

import ml_collections


def get_config():
  log = {{"files": {files!r}, "user": "user", "time": "time"}}
  fields = {{
    "item": {{"kind": "hash", "size": 1_000_000}},
    "category": {{"size": 1000}},
    "price": {{"kind": "numeric", "encoding": "log1p"}},
    "device": {{}},
  }}
  split = {{
    "train_end": "2024-05-01", "every_days": 20.0, "validation": ("2024-05-01",), "test": ("2024-06-01",)
  }}
  data = {{"path": {path!r}, "sources": {{"clicks": log}}, "fields": fields, "split": split}}
  tasks = {{
    "next_category": {{"kind": "next_event", "field": "category"}},
    "churn": {{"kind": "future_event", "source": "clicks", "horizon_days": 14.0, "negate": True}},
    "categories": {{"kind": "future_values", "field": "category", "top": 50, "horizon_days": 14.0}},
  }}
  return ml_collections.ConfigDict({{"data": data, "tasks": tasks}})
'''


def generate(folder: pathlib.Path, events: int) -> None:
  """Writes the log as PARTS Parquet files in order of time, with users of very different activity."""
  users = items = max(1, events // EVENTS_PER_USER)
  con = duckdb.connect()
  con.execute("SET threads = 2; SET memory_limit = '3GB'; SET preserve_insertion_order = false")
  # A draw x in [0, 1) to the power of 2 or 3 makes few users and items very frequent; hashes are the random numbers.
  draw = "(hash(i * {0} + {0}) % 1000000007) / 1000000007.0"
  for part in range(PARTS):
    first, last = events * part // PARTS, events * (part + 1) // PARTS
    con.execute(
      f"COPY (SELECT 'u' || floor(pow({draw.format(3)}, 1.5) * {users})::BIGINT AS \"user\", "
      f"TIMESTAMP '2024-01-01' + to_microseconds((i * {DAYS * 86400_000_000 / events!r})::BIGINT) AS time, "
      f"'i' || item AS item, 'c' || item % 997 AS category, round(exp(item % 700 / 100.0), 2) AS price, "
      "CASE hash(i) % 3 WHEN 0 THEN 'phone' WHEN 1 THEN 'web' ELSE 'tablet' END AS device "
      f"FROM (SELECT i, floor(pow({draw.format(7)}, 2) * {items})::BIGINT AS item FROM range({first}, {last}) t(i))"
      f") TO '{folder / f'log-{part}.parquet'}' (FORMAT parquet)"
    )


def resident(process: int) -> int:
  """Bytes resident in a process and its descendants, shared pages counted in each."""
  total, waiting = 0, [process]
  while waiting:
    pid = waiting.pop()
    try:
      status = pathlib.Path(f"/proc/{pid}/status").read_text()
      for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        waiting += map(int, (task / "children").read_text().split())
    except OSError:  # it has ended
      continue
    total += next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS")), 0)
  return total


def prepare(folder: pathlib.Path, events: int, memory: str) -> dict[str, Any]:
  """Prepares the log in `folder` and measures it."""
  config = folder / "config.py"
  config.write_text(CONFIG.format(events=events, files=str(folder / "log-*.parquet"), path=str(folder / "dataset")))
  command = [sys.executable, "-m", "supermoe_jax", "prepare", "--config", str(config), "--memory", memory]
  begun, peak, ended = time.perf_counter(), 0, threading.Event()
  with subprocess.Popen(command, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:

    def watch() -> None:
      nonlocal peak
      while not ended.wait(0.1):
        peak = max(peak, resident(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    ended.set()
    watcher.join()
  seconds = time.perf_counter() - begun
  if code:
    raise SystemExit(f"supermoe prepare ended with code {code}")
  size = sum(f.stat().st_size for f in (folder / "dataset").rglob("*") if f.is_file())
  return {"events": events, "seconds": seconds, "events_per_second": events / seconds, "peak": peak, "dataset": size}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--events", type=int, nargs="+", default=[3_000_000, 30_000_000])
  parser.add_argument("--memory", default="4GB", help="DuckDB's budget; default: 4GB")
  parser.add_argument("--folder", type=pathlib.Path, help="where the logs go; default: a temporary folder")
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args()
  rows = []
  for events in args.events:
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
      folder = pathlib.Path(name)
      print(f"generating {events:,} events")
      generate(folder, events)
      rows.append(prepare(folder, events, args.memory))
      shutil.rmtree(folder / "dataset")
  print("    events  seconds  events/s   peak  dataset")
  for r in rows:
    speed = f"{r['events_per_second'] / 1e3:,.0f}k"
    print(
      f"{r['events']:>10,} {r['seconds']:>8.1f} {speed:>9} {r['peak'] / 2**30:>5.2f}G {r['dataset'] / 2**30:>7.2f}G"
    )
  if args.json:
    args.json.write_text(json.dumps({"memory": args.memory, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
  main()
