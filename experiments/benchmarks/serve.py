"""The service on this machine: the same vectors as `embed`, requests a second, and 10,000 hostile requests.

supermoe export --workdir runs/quickstart
python experiments/benchmarks/serve.py --workdir runs/quickstart --model runs/quickstart/encoder

Starts `supermoe serve` on the loopback interface and sends it the raw rows of the run's Parquet files as JSON:

- every user once, whose vector must be that of `WORKDIR/embeddings` within 1e-5;
- `--requests` requests of one user each from `--clients` clients at a time: requests a second, latency;
- `--hostile` requests: a part of them made by schemathesis of the API's description, the others right ones with bytes,
  values or headers spoilt, and bodies too large. None may give a 5xx, and the server's memory, measured after the first
  tenth and at the end, must not grow by more than `--growth` MiB. The server must still answer as before.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import datetime
import json
import pathlib
import random
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from tqdm import tqdm

from supermoe_jax import config
from supermoe_jax.embeddings import embedding_files

JSON = {"content-type": "application/json"}
TOLERANCE = 1e-5


def raw_users(cfg: config.Config, schema: dict[str, Any], ids: list[Any]) -> list[dict[str, Any]]:
  """The rows of users in the Parquet files of a run's sources, as a client would send them."""
  found: dict[Any, dict[str, Any]] = {i: {"events": {s: [] for s in schema["sources"]}} for i in ids}
  for name, of in schema["sources"].items():
    source = cfg.data.sources[name]
    columns = [c for c, k in of["columns"].items() if not k["from_items"]]
    for file in source.files:
      table = pq.read_table(file, columns=list({source.user, of["time"]["column"], *columns}))
      table = table.filter(pc.is_in(table[source.user], pa.array(ids, table[source.user].type)))
      for row in table.to_pylist():
        event = {k: v.isoformat() if isinstance(v, datetime.date) else v for k, v in row.items()}
        found[event.pop(source.user)]["events"][name].append(event)
  return list(found.values())


@contextlib.contextmanager
def served(model: pathlib.Path) -> Iterator[tuple[str, int]]:
  """Runs the service; gives its address and its process' number."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-m", "supermoe_jax", "serve", "--model", str(model), "--port", str(port)]
  process = subprocess.Popen([*command, "--most-bytes", str(2 * 2**20)], stderr=subprocess.DEVNULL)
  try:
    address, begun = f"http://127.0.0.1:{port}", time.monotonic()
    while True:
      with contextlib.suppress(httpx.TransportError):
        httpx.get(f"{address}/health")
        break
      if process.poll() is not None or time.monotonic() - begun > 600:
        raise SystemExit("the service did not start")
      time.sleep(0.2)
    print(f"ready after {time.monotonic() - begun:.0f} s, every program compiled")
    yield address, process.pid
  finally:
    process.terminate()
    process.wait(30)


def resident(process: int) -> float:
  """MiB of memory that a process holds."""
  return int(pathlib.Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def vectors(address: str, as_of: str, users: list[dict[str, Any]]) -> np.ndarray:
  out = []
  for i in range(0, len(users), 4):
    answer = httpx.post(f"{address}/embed", json={"as_of": as_of, "users": users[i : i + 4]}, timeout=60)
    answer.raise_for_status()
    out += [u["embedding"] for u in answer.json()["users"]]
  return np.array(out, np.float32)


async def throughput(address: str, bodies: list[bytes], clients: int) -> tuple[float, np.ndarray, collections.Counter]:
  """Seconds, latencies and statuses of requests that `clients` send one after the other."""
  waiting, took, codes = list(bodies), [], collections.Counter()

  async def one(client: httpx.AsyncClient) -> None:
    while waiting:
      content, begun = waiting.pop(), time.perf_counter()
      codes[(await client.post("/embed", content=content, headers=JSON)).status_code] += 1
      took.append(time.perf_counter() - begun)

  async with httpx.AsyncClient(base_url=address, timeout=60) as client:
    begun = time.perf_counter()
    await asyncio.gather(*(one(client) for _ in range(clients)))
    return time.perf_counter() - begun, np.array(took), codes


# Values that have broken services, as JSON has them.
SPOILT = [
  *("NaN", "Infinity", "-1e999", "1e308", "-1e-320", "9" * 400, "1" * 99, "null", "true", "[]", "{}", "[[[[]]]]", '""'),
  *(r'"\ud800"', r'"\u0000"', '"' + "x" * 100_000 + '"', '"9999-12-31T23:59:59.999999"', '"0001-01-01"', '"-1"'),
  *('"2017-02-30"', '"10000-01-01"', "253402300799", "-62135596801", '"١٢"', "1.0000000000000000000000001", '"🦆"'),
  *(
    '"2017-01-01T00:00:00+99:99"',
    '{"a": 1, "a": 2}',
    "[" * 5000,
    '{"":' * 5000,
    '"\t"',
    "'x'",
    "0x10",
    "01",
    "+1",
    "1.",
  ),
]


def hostile(bodies: list[bytes], random_: random.Random) -> tuple[bytes, dict[str, str]]:
  """A request that nobody means well."""
  content, headers = random_.choice(bodies), dict(JSON)
  kind = random_.randrange(8)
  if kind == 0:
    content = content[: random_.randrange(len(content))]
  elif kind == 1:
    broken = bytearray(content)
    for _ in range(random_.randrange(1, 20)):
      broken[random_.randrange(len(broken))] = random_.randrange(256)
    content = bytes(broken)
  elif kind in (2, 3, 4):  # a value in the place of another
    text = content.decode()
    places = [i for i in range(len(text)) if text.startswith(": ", i)]
    start = random_.choice(places) + 2
    end = min((e for c in ",}]" if (e := text.find(c, start)) >= 0), default=len(text))
    content = (text[:start] + random_.choice(SPOILT) + text[end:]).encode("utf-8", "surrogatepass")
  elif kind == 5:
    kinds = ["", "text/plain", "application/json; charset=utf-16", "application/json;;;=", "multipart/form-data", "*/*"]
    headers["content-type"] = random_.choice(kinds)
    if random_.random() < 0.5:
      headers["content-encoding"] = random_.choice(["gzip", "br", "x", "identity"])
  elif kind == 6:
    text = random_.choice([b"[", b'{"a":', b" ", b'{"users":[', b"0", b'"', b"\xf0\x9f"])
    content = text * random_.choice([10, 10_000, 300_000])
    content = content[:2_200_000]
  else:
    users = json.loads(content)["users"]
    content = json.dumps({"as_of": "2017-11-01", "users": users * random_.choice([65, 200])}).encode()[:2_200_000]
  return content, headers


def made_by_schemathesis(address: str, n: int) -> list[tuple[bytes, dict[str, str]]]:
  """Requests of the API's description, half of them against it."""
  operation = schemathesis.openapi.from_url(f"{address}/openapi.json")["/embed"]["POST"]
  found: list[tuple[bytes, dict[str, str]]] = []
  for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

    @seed(0)
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
      max_examples=n // 2,
      deadline=None,
      database=None,
      phases=[Phase.generate],
      suppress_health_check=list(HealthCheck),
    )
    def take(case: Any) -> None:
      sent = case.as_transport_kwargs(base_url=address)
      content = sent.get("data")
      content = json.dumps(sent.get("json")).encode() if content is None else content
      found.append((content if isinstance(content, bytes) else str(content).encode("utf-8", "surrogatepass"), JSON))

    take()
  return found


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--model", type=pathlib.Path, required=True)
  parser.add_argument("--users", type=int, default=128)
  parser.add_argument("--requests", type=int, default=512)
  parser.add_argument("--clients", type=int, default=16)
  parser.add_argument("--hostile", type=int, default=10_000)
  parser.add_argument("--schemathesis", type=float, default=0.2, help="share of the hostile requests")
  parser.add_argument("--growth", type=float, default=32.0, help="MiB")
  args = parser.parse_args()
  table = embedding_files.read_embeddings(args.workdir / "embeddings")
  as_of = max(table["as_of"].to_pylist())
  table = table.filter(pc.equal(table["as_of"], pa.scalar(as_of, table["as_of"].type))).slice(0, args.users)
  wanted, day = embedding_files.embedding_vectors(table), as_of.isoformat()
  with served(args.model) as (address, process):
    schema = httpx.get(f"{address}/schema").json()
    users = raw_users(config.load_json(args.workdir / "config.json"), schema, table["user_id"].to_pylist())
    difference = float(np.abs(vectors(address, day, users) - wanted).max())
    events = sum(len(e) for u in users for e in u["events"].values()) / len(users)
    print(f"{len(users)} users as of {day}, {events:.0f} events each: largest difference {difference:.1e}")
    bodies = [json.dumps({"as_of": day, "users": [u]}).encode() for u in users]
    for clients in (1, args.clients):
      asked = [bodies[i % len(bodies)] for i in range(args.requests)]
      seconds, took, codes = asyncio.run(throughput(address, asked, clients))
      p50, p99 = np.percentile(took, [50, 99]) * 1e3
      print(
        f"{clients} clients: {len(took) / seconds:.1f} requests/s, p50 {p50:.0f} ms, p99 {p99:.0f} ms, {dict(codes)}"
      )
    if not args.hostile:
      return
    small = [json.dumps({"as_of": day, "users": [_shortened(u)]}).encode() for u in users[:16]]
    made = made_by_schemathesis(address, int(args.hostile * args.schemathesis))
    random_ = random.Random(0)
    made += [hostile(small, random_) for _ in range(args.hostile - len(made))]
    random_.shuffle(made)
    statuses: collections.Counter[int] = collections.Counter()
    first = 0.0
    with httpx.Client(base_url=address, timeout=60) as client:
      for i, (content, headers) in enumerate(tqdm(made, desc="hostile", unit=" requests", mininterval=1)):
        if i == len(made) // 10:
          first = resident(process)
        answer = client.post("/embed", content=content, headers=headers)
        statuses[answer.status_code] += 1
        if answer.status_code >= 500:
          print(answer.status_code, content[:300], headers)
    last = resident(process)
    print(f"{len(made)} hostile requests: {dict(sorted(statuses.items()))}; memory {first:.0f} → {last:.0f} MiB")
    again = float(np.abs(vectors(address, day, users[:8]) - wanted[:8]).max())
    if max(difference, again) > TOLERANCE or any(s >= 500 for s in statuses) or last - first > args.growth:
      raise SystemExit("FAILED")


def _shortened(user: dict[str, Any]) -> dict[str, Any]:
  return {"events": {source: events[-6:] for source, events in user["events"].items()}}


if __name__ == "__main__":
  main()
