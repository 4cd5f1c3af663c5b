"""Shows which processes work on a run directory: each keeps a heartbeat file in `workdir/hosts/`.

Processes meet through these files before they join each other through JAX. When JAX waits in vain for a missing
process, it ends the waiting one without naming the missing one. The files also keep two runs out of one directory, and
show a supervisor (see `supervisor`) which process is gone. They lie in the run directory, next to the checkpoints,
which all hosts must reach anyway.

On entry a process compares its config, dataset and versions with those of the others. If a step takes longer than
`hang_seconds`, the heartbeat writes the stacks of all threads to a file and ends the process.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from supermoe_jax import config
from supermoe_jax.distributed.processes import Place
from supermoe_jax.errors import ExitCode, RunError, Stopped

logger = logging.getLogger(__name__)

# Seconds between two heartbeats.
BEAT = 1.0

# Seconds without a heartbeat after which a process counts as gone.
DEAD = 20.0

# Seconds that processes wait for each other at the start.
WAIT = 300.0


class Heartbeat:
  """The heartbeat of this process: a context manager that on entry waits for the other processes of the run."""

  def __init__(
    self,
    workdir: pathlib.Path,
    place: Place | None,
    facts: Mapping[str, Any],
    *,
    hang_seconds: float = 0.0,
    wait: float = WAIT,
    stop: Callable[[], str] = lambda: "",
  ):
    """Describes this process.

    Args:
      workdir: the run directory.
      place: this process' place; None: it is alone.
      facts: values that must be equal in all processes, by name: strings, or nested dicts that JSON can hold.
      hang_seconds: seconds without `progress` after which this process writes the stacks of its threads to a file and
        ends; 0: never.
      wait: seconds to wait for the other processes.
      stop: returns what asks this process to stop, which ends the wait; "" while nothing does.
    """
    self._folder, self._workdir, self._wait = workdir / "hosts", workdir, wait
    self._index, self._of = (place.process, place.processes) if place else (0, 1)
    self._facts, self._hang, self._stop = dict(facts), hang_seconds, stop
    self._token = secrets.token_hex(8)
    self._file = self._folder / f"{self._index}.json"
    self._beats, self._step, self._since = 0, -1, time.monotonic()
    self._watching = False
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)

  def __enter__(self) -> Heartbeat:
    self._folder.mkdir(parents=True, exist_ok=True)
    self._take_place()
    self._write()
    time.sleep(BEAT / 20)
    self._check_own()  # of two processes that came at once, the later one stays
    self._thread.start()
    try:
      self._meet()
    except BaseException:
      time.sleep(3 * BEAT)  # so that the others can still read how this process differs
      self.__exit__()
      raise
    return self

  def __exit__(self, *unused: object) -> None:
    self._over.set()
    self._thread.join()
    if (read_heartbeat(self._file) or {}).get("token") == self._token:
      self._file.unlink(missing_ok=True)

  def progress(self, step: int) -> None:
    """Records that `step` is done; from the first call on, no step may take longer than `hang_seconds`."""
    self._step, self._since, self._watching = step, time.monotonic(), True

  def rest(self) -> None:
    """Records that no step is under way: nothing counts as hanging until the next `progress`."""
    self._watching = False

  def _take_place(self) -> None:
    """Raises a RunError if another live process holds this place."""
    before = read_heartbeat(self._file)
    if before is None or (before.get("machine") == _machine() and not _runs(int(before["pid"]))):
      return
    # The pid may belong to another program by now, and other machines cannot be asked. A live process changes its file.
    time.sleep(3 * BEAT)
    if read_heartbeat(self._file) != before:
      raise self._in_use(before)

  def _check_own(self) -> None:
    found = read_heartbeat(self._file)
    if found is not None and found.get("token") != self._token:
      raise self._in_use(found)

  def _in_use(self, other: Mapping[str, Any]) -> RunError:
    return RunError(
      f"{self._workdir} is in use: {process_name(other)} trains there. Wait for it, stop it, or name another --workdir."
    )

  def _meet(self) -> None:
    """Waits for the other processes, and compares the facts that must be equal in all of them."""
    others = [i for i in range(self._of) if i != self._index]
    first = {i: read_heartbeat(self._folder / f"{i}.json") for i in others}
    there: dict[int, dict[str, Any]] = {}
    end, told = time.monotonic() + self._wait, time.monotonic() + 5
    while len(there) < len(others):
      for i in set(others) - there.keys():
        found = read_heartbeat(self._folder / f"{i}.json")
        if found is not None and found != first[i]:  # an unchanged file is left from a process that is gone
          self._compare(found)
          there[i] = found
      if self._stop():
        raise Stopped(f"{self._stop()} before training began in {self._workdir}; the same command starts it")
      missing = [i for i in others if i not in there]
      if missing and time.monotonic() > end:
        raise RunError(
          f"{self._workdir}: of {self._of} processes {_names(missing, first)} did not start within {self._wait:.0f} s. "
          "Run the same command on all hosts, with one --workdir that all of them reach."
        )
      if missing and time.monotonic() > told:
        told = time.monotonic() + 30
        logger.info(f"waiting for {_names(missing, first)} of {self._of} processes")
      time.sleep(0.05)

  def _compare(self, other: Mapping[str, Any]) -> None:
    mine, theirs = self._facts, other["facts"]
    if other["of"] != self._of:
      raise RunError(
        f"{process_name(other)} is one of {other['of']} processes, this process one of {self._of}; start all with the "
        "same number."
      )
    for kind in mine:
      if mine[kind] != theirs.get(kind):
        changed = "; ".join(config.differences(theirs.get(kind), mine[kind], kind)[:4])
        raise RunError(
          f"{process_name(other)} runs with another {kind} than this process ({changed}); all processes need the same."
        )

  def _write(self) -> None:
    self._beats += 1
    sign = {
      "process": self._index,
      "of": self._of,
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "machine": _machine(),
      "token": self._token,
      "beat": self._beats,
      "step": self._step,
      "facts": self._facts,
    }
    temporary = self._file.with_name(f"{self._index}.{self._token}")
    temporary.write_text(json.dumps(sign))
    temporary.replace(self._file)

  def _live(self) -> None:
    while not self._over.wait(BEAT):
      try:
        self._check_own()
        self._write()
      except RunError as error:
        print(f"supermoe train: {error}", file=sys.stderr, flush=True)
        os._exit(ExitCode.ERROR)
      except OSError as error:  # the disk is full or gone; training fails when it saves
        print(f"warning: {self._file} cannot be written: {error}", file=sys.stderr)
      waited = time.monotonic() - self._since
      if self._hang and self._watching and waited > self._hang:
        self._hung(waited)

  def _hung(self, waited: float) -> None:
    """Writes the stack of every thread and ends the process: a thread that hangs in a collective cannot be stopped."""
    file = self._workdir / f"hang_{self._index}.txt"
    with file.open("w") as out:
      faulthandler.dump_traceback(out, all_threads=True)
    print(
      f"supermoe train: no step ended in the {waited:.0f} s after step {self._step}, longer than "
      f"config.train.hang_seconds={self._hang:g}; the stacks of all threads are in {file}. The same command resumes "
      "from the newest checkpoint.",
      file=sys.stderr,
      flush=True,
    )
    os._exit(ExitCode.RESUME)


def read_heartbeat(file: pathlib.Path) -> dict[str, Any] | None:
  """Returns the content of a heartbeat file; None if there is no readable one."""
  try:
    found = json.loads(file.read_text())
  except (OSError, json.JSONDecodeError):
    return None
  return found if isinstance(found, dict) else None


def process_name(sign: Mapping[str, Any]) -> str:
  """Returns the name of a process for messages: its number, host and pid."""
  return f"process {sign['process']} ({sign['host']}, pid {sign['pid']})"


def _names(missing: list[int], before: Mapping[int, dict[str, Any] | None]) -> str:
  def one(i: int) -> str:
    last = before[i]
    return f"process {i}" + (f" (last seen on {last['host']})" if last else "")

  return ", ".join(map(one, missing))


def _machine() -> str:
  """Returns an identifier of this system's boot and pid namespace: two pids compare only if both have the same one."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {pathlib.Path('/proc/self/ns/pid').readlink()}"
  except OSError:  # not Linux
    return socket.gethostname()


def _runs(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True
