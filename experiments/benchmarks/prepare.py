"""How fast is an event log prepared, and in how much memory?

    python experiments/benchmarks/prepare.py [--events 3000000 30000000] [--memory 4GB] [--folder DIR] [--json FILE]
                                             [--peers PYTHON]

Generates Parquet logs of 30 events a user on average: as many items as users, their frequencies falling as a power
law, and four fields (item, category, price, device). Then times `supermoe prepare` as a process of its own, from the
files to the dataset directory: events a second, and the most memory that the process and its children held at once.
Then a day follows, as many events as each day before it had, which `supermoe append` adds to the dataset.

`--peers` measures other libraries on the same log in the same way, from its files to what their users train on:
pytorch-lifestream's pandas preprocessor with its records written to a file, and RecBole's dataset for SASRec (each
event with at most 50 before it), its leave-one-out split and its loaders, all of which it keeps in memory. RecBole
reads text, which is written before the clock starts. Both need the whole log in memory, so only logs of at most
3,000,000 events are given to them. PYTHON is the interpreter of an environment of their own, made with Python 3.11 (of
torch, a build for the CPU will do; with pandas 3, which pip would choose, pytorch-lifestream takes twice as long):

    python3.11 -m venv PEERS
    PEERS/bin/pip install "setuptools<81" "numpy<2" "pandas<3" "pyarrow<22" torch==2.13.0 "dask[distributed]" \\
      pytorch-lifestream==0.7.0 recbole==1.2.1
    python experiments/benchmarks/prepare.py --events 3000000 --peers PEERS/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import signal
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
PEERS = {"pytorch-lifestream": "pytorch-lifestream", "recbole": "RecBole"}  # a package and the library's name
PEERS_EVENTS = 3_000_000  # of which RecBole makes 9.5 GB, and ten times that of the larger log

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
  """Writes the log as PARTS Parquet files in order of time, and the day that follows as `day.parquet`."""
  for part in range(PARTS):
    write(folder / f"log-{part}.parquet", events * part // PARTS, events * (part + 1) // PARTS, events)
  write(folder / "day.parquet", events, events + events // DAYS, events)


def write(file: pathlib.Path, first: int, last: int, events: int) -> None:
  """Writes some events of a log of so many, whose users are of very different activity."""
  users = items = max(1, events // EVENTS_PER_USER)
  con = duckdb.connect()
  con.execute("SET threads = 2; SET memory_limit = '3GB'; SET preserve_insertion_order = false")
  # A draw x in [0, 1) to the power of 2 or 3 makes few users and items very frequent; hashes are the random numbers.
  draw = "(hash(i * {0} + {0}) % 1000000007) / 1000000007.0"
  con.execute(
    f"COPY (SELECT 'u' || floor(pow({draw.format(3)}, 1.5) * {users})::BIGINT AS \"user\", "
    f"TIMESTAMP '2024-01-01' + to_microseconds((i * {DAYS * 86400_000_000 / events!r})::BIGINT) AS time, "
    f"'i' || item AS item, 'c' || item % 997 AS category, round(exp(item % 700 / 100.0), 2) AS price, "
    "CASE hash(i) % 3 WHEN 0 THEN 'phone' WHEN 1 THEN 'web' ELSE 'tablet' END AS device "
    f"FROM (SELECT i, floor(pow({draw.format(7)}, 2) * {items})::BIGINT AS item FROM range({first}, {last}) t(i))"
    f") TO '{file}' (FORMAT parquet)"
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


def watched(command: list[str], **settings: Any) -> tuple[int, float, int]:
  """Runs a command; returns its exit code, its seconds and the most bytes that were resident at once."""
  begun, peak, ended = time.perf_counter(), 0, threading.Event()
  with subprocess.Popen(command, **settings) as process:

    def watch() -> None:
      nonlocal peak
      while not ended.wait(0.1):
        peak = max(peak, resident(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    ended.set()
    watcher.join()
  return code, time.perf_counter() - begun, peak


def measured(library: str, folder: pathlib.Path, events: int, seconds: float, peak: int) -> dict[str, Any]:
  """A row of the table; `dataset` is the size of what was written there."""
  size = sum(f.stat().st_size for f in (folder / "dataset").rglob("*") if f.is_file())
  row = {"library": library, "events": events, "seconds": seconds, "events_per_second": events / seconds}
  return row | {"peak": peak, "dataset": size}


def prepare(folder: pathlib.Path, events: int, memory: str) -> dict[str, Any]:
  """Prepares the log in `folder` and measures it."""
  config = folder / "config.py"
  config.write_text(CONFIG.format(events=events, files=str(folder / "log-*.parquet"), path=str(folder / "dataset")))
  return supermoe("supermoe_jax", folder, events, "prepare", "--config", str(config), "--memory", memory)


def append(folder: pathlib.Path, events: int, memory: str) -> dict[str, Any]:
  """Appends the day after the log to its dataset and measures it."""
  arguments = ("--data", str(folder / "dataset"), "--memory", memory, str(folder / "day.parquet"))
  return supermoe("supermoe_jax append", folder, events // DAYS, "append", *arguments)


def supermoe(name: str, folder: pathlib.Path, events: int, *arguments: str) -> dict[str, Any]:
  """Runs a verb on so many events; returns its row of the table."""
  command = [sys.executable, "-m", "supermoe_jax", *arguments]
  code, seconds, peak = watched(command, env={**os.environ, "PYTHONUNBUFFERED": "1"})
  if code:
    raise SystemExit(f"supermoe {arguments[0]} ended with code {code}")
  return measured(name, folder, events, seconds, peak)


def prepare_peer(python: pathlib.Path, package: str, folder: pathlib.Path, events: int) -> dict[str, Any]:
  """Lets another library prepare the log in `folder`; returns a row with its `failure` if it does not."""
  # -I keeps this project's folders and settings out of the peers' environment.
  ask = [str(python), "-I", "-c", f"import importlib.metadata as m; print(m.version({package!r}))"]
  version = subprocess.run(ask, capture_output=True, text=True)
  if version.returncode:
    return {"library": PEERS[package], "events": events, "failure": version.stderr.strip().rpartition("\n")[2]}
  library = f"{PEERS[package]} {version.stdout.strip()}"
  print(f"preparing with {library}")
  script = pathlib.Path(__file__).absolute().with_name("prepare_peers.py")
  command = [str(python), "-I", str(script), package, str(folder), str(events)]
  output = folder / "output.txt"
  with output.open("w") as file:
    code, seconds, peak = watched(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
  if code:
    failure = output.read_text().strip().rpartition("\n")[2] or f"ended with code {code}"
    if code < 0:
      failure = f"ended by {signal.Signals(-code).name}; it held {peak / 2**30:.1f}G at most"
    return {"library": library, "events": events, "failure": failure}
  return measured(library, folder, events, seconds, peak)


def write_text(folder: pathlib.Path) -> None:
  """Writes the log as the file that RecBole reads."""
  (folder / "log").mkdir()
  duckdb.execute(
    'COPY (SELECT "user" AS "user_id:token", item AS "item_id:token", epoch_us(time) / 1e6 AS "timestamp:float", '
    'category AS "category:token", price AS "price:float", device AS "device:token" '
    f"FROM '{folder / 'log-*.parquet'}') TO '{folder / 'log' / 'log.inter'}' (FORMAT csv, DELIMITER '\t', HEADER)"
  )


def line(row: dict[str, Any]) -> str:
  """A line of the printed table."""
  start = f"{row['library']:<24} {row['events']:>10,}"
  if "failure" in row:
    return f"{start} failed: {row['failure']}"
  speed = f"{row['events_per_second'] / 1e3:,.0f}k"
  dataset = f"{row['dataset'] / 2**30:.2f}G" if row["dataset"] else "-"
  return f"{start} {row['seconds']:>8.1f} {speed:>9} {row['peak'] / 2**30:>5.2f}G {dataset:>8}"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--events", type=int, nargs="+", default=[3_000_000, 30_000_000])
  parser.add_argument("--memory", default="4GB", help="DuckDB's budget; default: 4GB")
  parser.add_argument("--folder", type=pathlib.Path, help="where the logs go; default: a temporary folder")
  parser.add_argument("--json", type=pathlib.Path)
  parser.add_argument("--peers", metavar="PYTHON", help="interpreter of the peers' environment; default: no peers")
  args = parser.parse_args()
  python = args.peers and shutil.which(args.peers)
  if args.peers and not python:
    parser.error(f"no interpreter at {args.peers}")
  if args.peers and min(args.events) > PEERS_EVENTS:
    parser.error(f"--peers needs a log of at most {PEERS_EVENTS:,} events")
  rows = []
  for events in args.events:
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
      folder = pathlib.Path(name).absolute()
      print(f"generating {events:,} events")
      generate(folder, events)
      rows += [prepare(folder, events, args.memory), append(folder, events, args.memory)]
      shutil.rmtree(folder / "dataset")
      if python and events <= PEERS_EVENTS:
        write_text(folder)
        for package in PEERS:
          (folder / "dataset").mkdir()
          rows.append(prepare_peer(pathlib.Path(python).absolute(), package, folder, events))
          shutil.rmtree(folder / "dataset")
  print("library                      events  seconds  events/s   peak  dataset")
  print("\n".join(map(line, rows)))
  if args.json:
    args.json.write_text(json.dumps({"memory": args.memory, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
  main()
