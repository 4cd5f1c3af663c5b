"""Supervises one of several processes that train together, and reports which of the others are gone.

When one process of a run is gone, JAX ends the others from threads of its own, or they wait for it for ever. Neither
can be caught inside the process. So the command that a user gives starts the training as its child and supervises it.
When the child ends, or the heartbeats of other processes stop (see `heartbeat`), the supervisor names the missing
processes and ends with an exit code that asks for the same command again.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from supermoe_jax.distributed import heartbeat
from supermoe_jax.distributed.processes import Place
from supermoe_jax.errors import DELIBERATE_EXITS, ExitCode

# The environment variable that marks the child: it has a supervisor and starts none.
CHILD = "SUPERMOE_SUPERVISED"

_PR_SET_PDEATHSIG = 1


def watched() -> bool:
  """Returns whether this process has a supervisor."""
  return CHILD in os.environ


def watch(arguments: Sequence[str], place: Place, workdir: pathlib.Path) -> int:
  """Runs `supermoe` with `arguments` as a child, until it ends or another process is gone; returns the exit code."""
  others, passed = _OtherProcesses(place, workdir), set[int]()
  child = subprocess.Popen(
    [sys.executable, "-m", "supermoe_jax", *arguments],
    env={**os.environ, CHILD: str(os.getpid()), "PYTHONFAULTHANDLER": "1"},
    process_group=0,  # a terminal's Ctrl-C reaches only this process, which forwards it once
  )

  def forward(number: int, frame: FrameType | None) -> None:
    del frame
    passed.add(number)
    if child.poll() is None:
      child.send_signal(number)

  for each in (signal.SIGTERM, signal.SIGINT):
    signal.signal(each, forward)
  while child.poll() is None:
    time.sleep(0.2)
    gone = others.gone()
    if gone and child.poll() is None:
      child.send_signal(signal.SIGABRT)  # its faulthandler writes the stacks of its threads
      child.wait()
      return _lost(gone)
  if child.returncode in DELIBERATE_EXITS:
    return child.returncode
  if -child.returncode in passed:  # it could not handle the signal yet, and had begun nothing
    return ExitCode.RESUME
  end = time.monotonic() + heartbeat.DEAD + 3 * heartbeat.BEAT
  while time.monotonic() < end:
    gone = others.gone()
    if gone:
      return _lost(gone, ended=True)
    time.sleep(0.2)
  what = f"signal {signal.Signals(-child.returncode).name}" if child.returncode < 0 else f"code {child.returncode}"
  hint = "; the system may have been out of memory" if child.returncode == -signal.SIGKILL else ""
  print(f"supermoe train: process {place.process} was ended by {what}{hint}; all other processes run.", file=sys.stderr)
  return ExitCode.CRASHED


class _OtherProcesses:
  """The heartbeats of the other processes, timed by this host's clock alone: no two clocks are compared."""

  def __init__(self, place: Place, workdir: pathlib.Path):
    self._files = {i: workdir / "hosts" / f"{i}.json" for i in range(place.processes) if i != place.process}
    self._left_behind = {i: heartbeat.read_heartbeat(file) for i, file in self._files.items()}
    self._seen: dict[int, tuple[dict[str, Any], float]] = {}

  def gone(self) -> list[str]:
    """Returns the processes that were there, and whose heartbeat has stopped or is missing for `heartbeat.DEAD` s."""
    now, out = time.monotonic(), []
    for i, file in self._files.items():
      found, last = heartbeat.read_heartbeat(file), self._seen.get(i)
      if last is None:
        if found is not None and found != self._left_behind[i]:
          self._seen[i] = (found, now)
      elif found is not None and found != last[0]:
        self._seen[i] = (found, now)
      elif now - last[1] > heartbeat.DEAD:
        out.append(f"{heartbeat.process_name(last[0])}, last seen at step {max(last[0]['step'], 0)}")
    return out


def _lost(gone: list[str], ended: bool = False) -> int:
  mine = "has ended too, with the error above" if ended else "ends too"
  print(
    f"supermoe train: {' and '.join(gone)}: no sign of life for {heartbeat.DEAD:.0f} s; this process {mine}. Run the "
    "same command on all hosts again: it resumes from the newest checkpoint.",
    file=sys.stderr,
    flush=True,
  )
  return ExitCode.RESUME


def follow() -> None:
  """Makes this process, a supervisor's child, end with the supervisor; on Linux even if the supervisor is killed."""
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != int(os.environ[CHILD]):  # the supervisor had already ended
    os._exit(ExitCode.CRASHED)
