"""How the processes of a pod talk to each other without JAX, and a limit on the time of whatever may hang.

JAX' own key-value store comes too late for this: its client joins at a barrier, and where a process is missing, or
speaks another version, C++ ends all others there without a word of who it was. So the first process listens at the port
where JAX' coordinator will be, only until all have come; JAX can have the port then, while the connections stay. Over
them goes what each process says, as a line of JSON, and what it is at, so that the first one can name who is late.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
  from supermoe_jax.distributed.processes import Place

# Seconds that the first process waits longer than a step may take, so that one that hangs speaks for itself.
GRACE = 5.0

# Seconds after that when a process ends whose interpreter hangs as well.
LAST = 20.0

# Seconds between two signs of life, and without one after which a process is taken for the reason when others hang.
BEAT, SILENT = 1.0, 8.0

# What went wrong, by process.
Reasons = dict[int, str]


class Meeting:
  """The processes of a pod, each with a connection to the first; alone, a process hears itself only."""

  def __init__(self, place: Place | None, seconds: float, ended: Callable[[Reasons], NoReturn]):
    """Describes this process.

    Args:
      place: this process' place; None: it is alone.
      seconds: how long others are waited for.
      ended: is called, in any thread, when the check cannot go on, to end the process; it does not return.
    """
    self.process, self.processes = (place.process, place.processes) if place else (0, 1)
    self._address, self._seconds, self._ended = place.coordinator if place else "", seconds, ended
    self.hosts = {self.process: socket.gethostname()}
    self.steps: dict[int, str] = {}
    self.clocks: dict[int, float] = {0: 0.0}  # seconds that a process' clock is ahead of the first one's
    self._lines: dict[int, socket.socket] = {}
    self._said: dict[int, collections.deque[Any]] = {}
    self._heard: dict[int, float] = {}
    self._left: set[int] = set()
    self._news = threading.Condition()
    self._ending, self._over = threading.Lock(), False
    self._sending = threading.Lock()

  def open(self) -> None:
    """Waits for all processes; the first one ends the check when one does not come."""
    if self.processes == 1:
      return
    try:
      if self.process:
        self._call()
      else:
        self._receive()
    except OSError as error:
      self.stop({self.process: f"cannot listen at the port of {self._address} ({error}); another run may hold it"})
    self.hosts = dict(enumerate(self.gather(self.hosts[self.process])))

  def gather(self, words: Any) -> list[Any]:
    """Returns what each process says, for JSON, in the order of their numbers; all must call."""
    if self.processes == 1:
      return [words]
    if self.process:
      self._send(0, {"words": words, "clock": time.time()})
      if not self._wait([0], 2 * GRACE):
        self.stop({0: f"did not answer within {self._seconds:g} s"})
      return list(self._said[0].popleft())
    others = range(1, self.processes)
    if not self._wait(others, GRACE):
      late = [i for i in others if not self._said[i]]
      self.stop(dict.fromkeys(late, f"late by more than {self._seconds:g} s"))
    said = [words, *(self._said[i].popleft() for i in others)]
    for i in others:
      self._send(i, {"words": said})
    return said

  def note(self, step: str) -> None:
    """Tells the first process what this one begins."""
    self.steps[self.process] = step
    if self.process:
      self._send(0, {"step": step})

  def alive(self) -> None:
    """Shows the first process that this one lives."""
    if self.process and 0 in self._lines:
      self._send(0, {"alive": True})

  def hang(self, reason: str) -> NoReturn:
    """Ends the check, since this process hangs; a collective hangs for all, so one that is silent is the reason."""
    if self.process:
      self._send(0, {"hangs": reason})
      time.sleep(GRACE)  # the first one ends this process
      self.stop({self.process: reason})
    self._hangs(self.process, reason)

  def stop(self, reasons: Reasons) -> NoReturn:
    """Ends the check on all processes, the first one last: with it goes JAX' coordinator, which ends all others."""
    with self._ending:
      if self._over:
        raise SystemExit(1)
      self._over = True
      for i in list(self._lines):
        self._send(i, {"end": reasons})
      if not self.process:
        with self._news:
          self._news.wait_for(lambda: self._left >= self._lines.keys(), GRACE)
      self._ended(reasons)

  def close(self) -> None:
    """Parts from the others in peace."""
    for i, line in self._lines.items():
      self._send(i, {"bye": True})
      with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_WR)

  def _receive(self) -> None:
    port, end = int(self._address.rpartition(":")[2]), time.monotonic() + self._seconds
    both = socket.has_dualstack_ipv6()
    with socket.create_server(
      ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
    ) as server:
      server.settimeout(0.1)
      while len(self._lines) < self.processes - 1 and time.monotonic() < end:
        with contextlib.suppress(TimeoutError):
          threading.Thread(target=self._welcome, args=(server.accept()[0],), daemon=True).start()
    missing = [i for i in range(1, self.processes) if i not in self._lines]
    if missing:
      remedy = f"give the same command there, and see that it reaches {self._address}"
      self.stop(dict.fromkeys(missing, f"did not come within {self._seconds:g} s; {remedy}"))

  def _welcome(self, line: socket.socket) -> None:
    """Takes in whoever says who it is; anything else may have come by the port."""
    line.settimeout(10.0)
    stream = line.makefile("r", encoding="utf-8")
    try:
      hello = json.loads(stream.readline())
      process, of, host = int(hello["process"]), int(hello["of"]), str(hello["host"])
    except (OSError, ValueError, KeyError, TypeError):
      line.close()
      return
    line.settimeout(None)
    with self._news:
      twice, fits = process in self._lines, of == self.processes and 0 < process < of
      if not twice and fits:
        self.hosts[process], self._said[process] = host, collections.deque()
        self._lines[process] = line
    if fits and not twice:
      self._listen(process, stream)
      return
    reason = f"there are two, on {self.hosts.get(process)} and {host}; give each its own --process"
    if not fits:
      reason = f"on {host} is one of {of} processes, the first of {self.processes}; name the same number"
    _write(line, {"end": {process: reason}})
    self.stop({process: reason})

  def _call(self) -> None:
    host, _, port = self._address.rpartition(":")
    end, line = time.monotonic() + self._seconds, None
    while line is None:
      try:
        line = socket.create_connection((host.strip("[]"), int(port)), timeout=5.0)
      except OSError as error:
        if time.monotonic() > end:
          remedy = f"start the check there, and see that this host reaches {self._address} ({error})"
          self.stop({0: f"did not come within {self._seconds:g} s; {remedy}"})
        time.sleep(0.1)
    line.settimeout(None)
    self._lines[0], self._said[0] = line, collections.deque()
    self._send(0, {"process": self.process, "of": self.processes, "host": self.hosts[self.process]})
    threading.Thread(target=self._listen, args=(0, line.makefile("r", encoding="utf-8")), daemon=True).start()

  def _listen(self, who: int, stream: Any) -> None:
    """Takes what a process says until it leaves; one that leaves without a word is lost, which ends the check."""
    heard = False
    with contextlib.suppress(OSError, ValueError):
      for text in stream:
        heard, self._heard[who] = True, time.monotonic()
        message = json.loads(text)
        if "bye" in message:
          return
        if "end" in message:
          with self._news:
            self._left.add(who)
            self._news.notify_all()
          self.stop({int(k): v for k, v in message["end"].items()})
        if "hangs" in message:
          self._hangs(who, message["hangs"])
        if "step" in message:
          self.steps[who] = message["step"]
        if "clock" in message:
          self.clocks.setdefault(who, message["clock"] - time.time())
        if "words" in message:
          with self._news:
            self._said[who].append(message["words"])
            self._news.notify_all()
    with self._news:
      self._left.add(who)
      self._news.notify_all()
    if who == 0 and not heard:
      self.stop({0: f"is not at {self._address}: something else answers there; another run may hold the port"})
    self.stop({who: "is gone" + self._in_step(who)})

  def _hangs(self, who: int, reason: str) -> NoReturn:
    now = time.monotonic()
    silent = {i: now - at for i, at in self._heard.items() if now - at > SILENT}
    told = {i: f"no sign of life for {seconds:.0f} s{self._in_step(i)}" for i, seconds in silent.items()}
    self.stop(told or {who: reason})

  def _in_step(self, who: int) -> str:
    return f", in step {self.steps[who]!r}" if who in self.steps else ""

  def _send(self, to: int, message: dict[str, Any]) -> None:
    with self._sending:  # from several threads
      _write(self._lines[to], message)

  def _wait(self, others: Sequence[int], grace: float) -> bool:
    with self._news:
      return self._news.wait_for(lambda: all(self._said[i] for i in others), self._seconds + grace)


def _write(line: socket.socket, message: dict[str, Any]) -> None:
  with contextlib.suppress(OSError):  # one that is gone is noticed where it is listened to
    line.sendall(json.dumps(message).encode() + b"\n")


class Watch:
  """A limit on the time of each step, kept by a thread of its own."""

  def __init__(
    self,
    seconds: float,
    begun: Callable[[str], None],
    hung: Callable[[str], None],
    alive: Callable[[], None] = lambda: None,
  ):
    """Begins to watch.

    Args:
      seconds: what a step may take.
      begun: is told each step.
      hung: is told one that takes longer, to end the process.
      alive: is called every now and then as long as the interpreter runs.
    """
    self._seconds, self._begun, self._hung, self._alive = seconds, begun, hung, alive
    self._step, self._since = "", 0.0
    threading.Thread(target=self._live, name="watch", daemon=True).start()

  @contextlib.contextmanager
  def step(self, name: str) -> Iterator[None]:
    """Watches over what is done inside."""
    self._since, self._step = time.monotonic(), name
    # A call that hangs and does not let go of the interpreter stops our thread too, but not this one.
    faulthandler.dump_traceback_later(self._seconds + GRACE + LAST, exit=True)
    try:
      self._begun(name)
      yield
    finally:
      self._step = ""
      faulthandler.cancel_dump_traceback_later()

  def _live(self) -> None:
    told = time.monotonic()
    while True:
      time.sleep(min(0.2, self._seconds / 4))
      if time.monotonic() - told > BEAT:
        told = time.monotonic()
        self._alive()
      name, since = self._step, self._since
      if name and time.monotonic() - since > self._seconds:
        print(f"step {name!r}: nothing for {self._seconds:g} s; every thread stands here:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self._hung(name)
        os._exit(1)
