"""Says whether a pod is right, before a training run costs money; give the same command on every host at once.

    .venv/bin/python tpu_setup/check_pod.py [--config CONFIG [--config.key=value …]] [--json FILE] [--timeout SECONDS]

1. Versions, code, config and dataset of all hosts are compared before a backend is touched: of different versions they
   may hang when they meet.
2. Each device multiplies matrices of whole numbers.
3. All-reduce and all-to-all over all devices: are they right, and how fast; see `pod_steps` for what is measured. Since
   a collective ends for all at once, a slow link slows all hosts; each also times its own devices, which shows whose.
4. Two steps of a tiny model, by the code that trains.
5. A verdict for each host. A note is no fault: a clock that differs, a host that is slow.

The processes find each other as those of `supermoe train` do; alone, a process checks its host. The exit code is 0 if
all is right, else 1.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
from pod_meeting import Meeting, Reasons, Watch

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.distributed import processes
from supermoe_jax.errors import ConfigError, ExitCode
from supermoe_jax.training.checkpoints.checkpoint import code_hash, versions

# What makes an accelerator's backend, and need not be installed elsewhere.
BACKENDS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")

# Seconds that a clock may differ, and how many times as long as the others a host may take, without a word.
CLOCK, SLOW = 3.0, 2.0

# Facts that all hosts must have in common, and what to do about one that differs.
REMEDIES = {
  "versions": "install the same on all hosts, as tpu_setup/install.sh does",
  "code": "check the same commit out on all hosts",
  "config": "give the same command on all hosts, with the same files",
  "dataset": "let config.data.path be the same dataset on all hosts",
}


# --------------------------------------------------------------------------------------------------------------- facts


def facts(config_file: str | None, overrides: Sequence[str]) -> dict[str, Any]:
  """What this host has; no backend is touched. Beside `REMEDIES`' keys, `problems` are what is wrong by itself."""
  said: dict[str, Any] = {"versions": {"Python": platform.python_version(), **versions()}, "code": code_hash()}
  for name in BACKENDS:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      said["versions"][name] = importlib.metadata.version(name)
  said |= {"config": None, "config_hash": None, "dataset": None, "problems": []}
  if config_file is None:
    return said
  try:
    cfg = config.load(config_file, overrides)
    said |= {"config": config.to_dict(cfg), "config_hash": cfg.hash()}
    dataset = Dataset(cfg.data.path)
    dataset.check_matches(cfg)
    said["dataset"] = dataset.manifest["encoding_hash"]
  except Exception as error:  # a host that cannot read what it should is told, whatever the reason
    said["problems"].append(str(error) or repr(error))
  return said


def majority(values: Sequence[Any]) -> Any:
  """The value that most have; of several such the one that comes first."""
  count = collections.Counter(json.dumps(v, sort_keys=True) for v in values)
  return json.loads(max(count, key=lambda v: count[v]))  # keys are in the order in which they came


def compare(said: Sequence[Mapping[str, Any]]) -> Reasons:
  """What is wrong with each process' facts, of those that have something wrong."""
  found: dict[int, list[str]] = {i: list(each["problems"]) for i, each in enumerate(said)}
  names = list(dict.fromkeys(name for each in said for name in each["versions"]))
  for name in names:
    have = [each["versions"].get(name, "missing") for each in said]
    _differing(found, name, have, REMEDIES["versions"])
  _differing(found, "code", [each["code"] for each in said], REMEDIES["code"])
  configs, wanted = [each["config"] for each in said], majority([each["config"] for each in said])
  for i, mine in enumerate(configs):
    if mine != wanted and not said[i]["problems"]:
      changed = "; ".join(config.differences(wanted, mine)[:4]) if mine and wanted else "not all have --config"
      theirs = next(each["config_hash"] for each in said if each["config"] == wanted)
      told = f"config {said[i]['config_hash']}, the others have {theirs} ({changed})"
      found[i].append(f"{told}; {REMEDIES['config']}")
  readable = {i: each["dataset"] for i, each in enumerate(said) if not each["problems"]}
  if readable:
    common = majority(list(readable.values()))
    for i, mine in readable.items():
      if mine != common:
        found[i].append(f"dataset {mine}, the others have {common}; {REMEDIES['dataset']}")
  return {i: "; ".join(reasons) for i, reasons in found.items() if reasons}


def _differing(found: dict[int, list[str]], name: str, have: Sequence[str], remedy: str) -> None:
  wanted = majority(have)
  for i, mine in enumerate(have):
    if mine != wanted:
      found[i].append(f"{name} {mine}, the others have {wanted}; {remedy}")


def compare_devices(said: Sequence[Mapping[str, Any]]) -> Reasons:
  """What is wrong with what each process sees of the devices, and with what these compute."""
  together, found = sum(each["local"] for each in said), collections.defaultdict(list)
  common = {key: majority([each[key] for each in said]) for key in ("platform", "kinds", "local")}
  for i, each in enumerate(said):
    if (each["all"], each["processes"]) != (together, len(said)):
      found[i].append(
        f"sees {each['all']} devices of {each['processes']} processes, there are {together} of {len(said)}; another "
        "JAX, or a process that does not know of the others"
      )
    for key, wanted in common.items():
      if each[key] != wanted:
        found[i].append(f"{key} {each[key]}, the others have {wanted}")
    found[i] += [f"{device} computes wrongly; have it replaced" for device in each["wrong"]]
  return {i: "; ".join(reasons) for i, reasons in found.items() if reasons}


def slow(seconds: Sequence[float]) -> list[int]:
  """Who takes more than `SLOW` times as long as one in the middle."""
  middle = sorted(seconds)[(len(seconds) - 1) // 2]
  return [i for i, each in enumerate(seconds) if each > SLOW * middle]


def compare_training(said: Sequence[Mapping[str, Any]]) -> Reasons:
  """What is wrong with each process' steps."""
  data, losses = (majority([each[key] for each in said]) for key in ("dataset", "losses"))
  found = collections.defaultdict(list)
  for i, each in enumerate(said):
    if each["dataset"] != data:
      found[i].append(f"prepares another dataset from the same users ({each['dataset']}, the others {data})")
    if not all(abs(loss) < float("inf") for loss in each["losses"]):
      found[i].append(f"losses {each['losses']} are not finite")
    elif each["losses"] != losses:
      found[i].append(f"losses {each['losses']}, the others have {losses}: devices do not compute the same")
  return {i: "; ".join(reasons) for i, reasons in found.items()}


def table(rows: Sequence[Sequence[Any]]) -> str:
  """Rows as lines, in columns."""
  widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
  return "\n".join("  ".join(str(v).ljust(w) for v, w in zip(row, widths)).rstrip() for row in rows)


# --------------------------------------------------------------------------------------------------------------- check


class Check:
  """One process' check of a pod."""

  def __init__(self, place: processes.Place | None, args: argparse.Namespace, overrides: Sequence[str]):
    """Describes it; the processes meet in `run`."""
    self._place, self._args, self._overrides = place, args, overrides
    self._meeting = Meeting(place, args.timeout, self._end)
    self._watch = Watch(args.timeout, self._meeting.note, self._hung, self._meeting.alive)
    self._notes: dict[int, list[str]] = collections.defaultdict(list)
    self._told: dict[str, Any] = {}  # all that is measured, for --json

  def run(self) -> int:
    """Checks; returns the exit code."""
    wrong = self._compare()
    if not wrong:
      with self._watch.step("joining: jax.distributed.initialize"):
        processes.initialize(self._place)
      wrong = self._devices()
    if not wrong:
      # These import what training needs, and take devices that compute for granted.
      wrong = self._collectives() or self._training()
    self._verdict(wrong)
    if jax.distributed.is_initialized():
      with self._watch.step("leaving: jax.distributed.shutdown"):
        processes.leave()
    self._meeting.close()
    return ExitCode.ERROR if wrong else ExitCode.OK

  def fail(self, reason: str) -> NoReturn:
    """Ends the check on all hosts, since this one cannot go on."""
    self._meeting.stop({self._meeting.process: reason})

  def _compare(self) -> Reasons:
    self._say(f"waiting for {self._meeting.processes - 1} other process(es)" if self._place else "one process")
    self._meeting.open()
    with self._watch.step("facts: versions, code, config, dataset"):
      mine = facts(self._args.config, self._overrides)
    said = self._meeting.gather(mine)
    self._told["facts"] = said
    names = list(dict.fromkeys(name for each in said for name in each["versions"]))
    rows: list[list[Any]] = [["process", "host", *names, "code", "config", "dataset"]]
    for i, each in enumerate(said):
      found = [each["versions"].get(name, "-") for name in names]
      rows.append([i, self._meeting.hosts[i], *found, each["code"], each["config_hash"] or "-", each["dataset"] or "-"])
    self._say(table(rows))
    for i, ahead in sorted(self._meeting.clocks.items()):
      if abs(ahead) > CLOCK:
        self._notes[i].append(f"its clock is {ahead:+.1f} s off that of process 0; see to its time service (NTP)")
    return compare(said)

  def _devices(self) -> Reasons:
    with self._watch.step("devices: jax.devices"):
      import pod_steps

      mine = pod_steps.describe()
    with self._watch.step("devices: a product on each"):
      wanted = pod_steps.checksum_wanted()
      mine["wrong"] = [str(d) for d in jax.local_devices() if pod_steps.checksum(d) != wanted]
    said = self._meeting.gather(mine)
    self._told["devices"] = said
    rows: list[list[Any]] = [["process", "devices", "of all", "kind", "memory of one"]]
    for i, each in enumerate(said):
      rows.append([i, each["local"], each["all"], ", ".join(each["kinds"]), f"{each['memory'] / 2**30:.1f} GiB"])
    self._say(table(rows))
    return compare_devices(said)

  def _collectives(self) -> Reasons:
    import pod_steps

    free = min(each["free"] for each in self._told["devices"])
    fits = pod_steps.sizes_that_fit(self._args.sizes, free)
    self._told["collectives"], wrong = [], collections.defaultdict(list)
    rows: list[list[Any]] = [
      ["collective", "over", "MiB a device", "ms", "GB/s a device: algorithm", "bus", "repetitions"]
    ]
    scopes = {"all devices": jax.devices(), "each host's own": jax.local_devices()}
    for scope, devices in scopes.items() if self._place else list(scopes.items())[:1]:
      for operation in pod_steps.OPERATIONS:
        for size in fits:
          row, mistaken = self._collective(operation, scope, devices, size)
          for i, names in mistaken.items():
            wrong[i].append(f"{operation} of {row['bytes']:,} bytes over {scope} is wrong on {names}")
          self._told["collectives"].append(row)
          took = [f"{row['bytes'] / 2**20:.2f}", f"{1e3 * row['slowest']:.3f}"]
          rows.append(
            [operation, scope, *took, f"{row['algorithm_gbs']:.3f}", f"{row['bus_gbs']:.3f}", row["repetitions"]]
          )
          for i in slow(row["seconds"]) if size == fits[-1] else ():
            self._notes[i].append(
              f"slow: {operation} over {scope} takes {1e3 * row['seconds'][i]:.1f} ms, elsewhere "
              f"{1e3 * min(row['seconds']):.1f} ms"
            )
    self._say(table(rows))
    return {i: "; ".join(reasons) for i, reasons in wrong.items()}

  def _collective(
    self, operation: str, scope: str, devices: Sequence[jax.Device], size: int
  ) -> tuple[dict[str, Any], dict[int, str]]:
    """Measures one; returns a row of what was measured, and the devices with a wrong result by process."""
    import pod_steps

    collective = pod_steps.Collective(operation, devices, size)
    with self._watch.step(f"bandwidth: {operation} of {size / 2**20:g} MiB over {scope}"):
      mine = {"wrong": collective.wrong(), "warm_up": collective.seconds(1)}
    said = self._meeting.gather(mine)
    # The others' time counts, for all must make as many.
    times = pod_steps.repetitions(max(each["warm_up"] for each in said))
    with self._watch.step(f"bandwidth: {operation} of {size / 2**20:g} MiB over {scope}, {times} times"):
      took = collective.seconds(times)
    seconds = self._meeting.gather(took)
    slowest, n = max(seconds), len(devices)
    row = {
      "operation": operation,
      "scope": scope,
      "devices": n,
      "bytes": collective.size,
      "repetitions": times,
      "seconds": seconds,
      "slowest": slowest,
      "algorithm_gbs": pod_steps.algorithm_bandwidth(collective.size, slowest),
      "bus_gbs": pod_steps.bus_bandwidth(operation, collective.size, n, slowest),
    }
    return row, {i: ", ".join(each["wrong"]) for i, each in enumerate(said) if each["wrong"]}

  def _training(self) -> Reasons:
    import pod_steps

    with self._watch.step("training: data of a tiny model"):
      training = pod_steps.Training()
    with self._watch.step("training: two steps of a tiny model"):
      mine = training.run()
    said = self._meeting.gather(mine)
    sizes = training.sizes
    self._told["training"] = {"mesh": config.to_dict(sizes), "processes": said}
    first, second = (max(each["seconds"][i] for each in said) for i in range(2))
    self._say(
      f"training: mesh {sizes.data}×{sizes.expert}×{sizes.tensor} (data × expert × tensor), losses "
      f"{', '.join(f'{loss:.6f}' for loss in mine['losses'])}; a step takes {1e3 * second:.1f} ms, the first one "
      f"{first:.1f} s, for it is compiled"
    )
    return compare_training(said)

  def _verdict(self, wrong: Reasons, at: Mapping[int, str] | None = None) -> None:
    """Tells how each process is and writes what was measured; others than the first tell what concerns them.

    Args:
      wrong: what is wrong, by process.
      at: of a check that cannot go on the step that each process was in; what follows it is not known to be right.
    """
    lines, parts = {}, range(self._meeting.processes)
    for i in parts:
      host = f", {self._meeting.hosts[i]}" if i in self._meeting.hosts else ""
      known = "OK" if at is None else f"not known; it was in step {at[i]!r}" if i in at else "not known"
      notes = "".join(f"; note: {note}" for note in self._notes[i])
      lines[i] = f"process {i}{host}: {f'WRONG: {wrong[i]}' if i in wrong else known}{notes}"
    if self._meeting.process:
      print(*(lines[i] for i in parts if i == self._meeting.process or i in wrong), sep="\n", flush=True)
      return
    print(*lines.values(), "the pod is not right" if wrong else "the pod is right", sep="\n", flush=True)
    if self._args.json is not None:
      verdict = [
        {"process": i, "host": self._meeting.hosts.get(i), "wrong": wrong.get(i), "notes": self._notes[i]}
        for i in parts
      ]
      told = {"right": not wrong, "verdict": verdict, "clocks": self._meeting.clocks, **self._told}
      self._args.json.write_text(json.dumps(told, indent=1) + "\n")

  def _hung(self, step: str) -> None:
    self._meeting.hang(f"hangs in step {step!r}, for more than {self._args.timeout:g} s")

  def _end(self, reasons: Reasons) -> NoReturn:
    """Ends this process, from whatever thread: its other threads may hang."""
    try:
      self._verdict(reasons, self._meeting.steps)
      sys.stderr.flush()
    finally:
      os._exit(ExitCode.ERROR)

  def _say(self, text: str) -> None:
    if not self._meeting.process:
      print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
  """Checks the pod as one of its processes; returns the exit code."""
  parser = argparse.ArgumentParser(description="Says whether a pod is right, before a training run costs money.")
  parser.add_argument("--config", help="config file of the run to come; override keys with --config.key=value")
  parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="the first process writes all figures here")
  parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="for each step; default: 300")
  parser.add_argument(
    "--sizes", type=float, nargs="+", default=[1.0, 64.0], metavar="MIB", help="buffers of a device; default: 1 64"
  )
  several = parser.add_argument_group("several processes", "found by themselves on TPU pods, GKE, JobSet, SLURM, MPI")
  several.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process, as the others reach it")
  several.add_argument("--processes", type=int, metavar="N", help="how many there are")
  several.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
  args, rest = parser.parse_known_args(arguments)
  overrides = [a for a in rest if a.startswith("--config.")]
  if len(overrides) < len(rest) or (overrides and args.config is None):
    parser.error(f"unknown argument {next(a for a in rest if a not in overrides or args.config is None)!r}")
  if args.timeout <= 0 or min(args.sizes) <= 0:
    parser.error("--timeout and --sizes must be more than 0")
  try:
    place = processes.find_place(args.coordinator, args.processes, args.process)
  except ConfigError as error:
    print(f"check_pod: {error}", file=sys.stderr)
    return ExitCode.ERROR
  start = time.monotonic()
  check = Check(place, args, overrides)
  try:
    code = check.run()
  except (Exception, KeyboardInterrupt) as error:
    traceback.print_exc()
    check.fail(f"{type(error).__name__}: {error}")
  if place is None or not place.process:
    print(f"checked in {time.monotonic() - start:.0f} s")
  return code


if __name__ == "__main__":
  raise SystemExit(main())
