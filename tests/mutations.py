"""Plants faults in the package on purpose, one after the other, and says which of them the tests notice.

    python tests/mutations.py                       every fault; its part's quick tier, then all of it
    python tests/mutations.py --only ranking --quick
    python tests/mutations.py --list

Each worker has a copy of the checkout in a temporary folder, whose package Python takes for that of the environment:
the checkout itself is never changed. Compiled programs are shared with it (`.cache`). The faults stand in
`fixtures/faults`. Exit codes: 0 all are noticed; 1 one is not; 2 a fault does not fit the package any more, the tests
fail without a fault, or could not run.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent import futures

from fixtures.faults import FAULTS, Fault

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "supermoe_jax"
COPIED = (
  *(PACKAGE, "tests", "docs", "experiments", "notebooks", "tpu_setup"),
  *("pyproject.toml", "requirements.txt", "Makefile", "README.md", "LICENSE", ".gitignore"),
)

QUICK, WHOLE = "not nightly", ""  # what `-m` selects of a part's tests
TIERS = {QUICK: "quick tier", WHOLE: "whole suite"}

CAUGHT, MISSED, BROKEN = "caught", "missed", "error"

# How pytest's summary names what failed.
_FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run of pytest came to: `verdict`, and `by`, the test that noticed, or what went wrong."""

  verdict: str
  by: str
  seconds: float


@dataclasses.dataclass
class Result:
  """What became of a fault; a tier that was not asked is None."""

  fault: Fault
  quick: Run
  whole: Run | None = None

  @property
  def caught(self) -> bool:
    """Whether any tier noticed it."""
    return any(run is not None and run.verdict == CAUGHT for run in (self.quick, self.whole))


# ---------------------------------------------------------------------------------------------------------- what fits


def problems(faults: Iterable[Fault], root: pathlib.Path = ROOT) -> list[str]:
  """What keeps faults from being planted, a sentence each."""
  out = []
  for name, count in collections.Counter(f.name for f in faults).items():
    if count > 1:
      out.append(f"{name}: {count} faults have this name")
  for fault in faults:
    file = root / PACKAGE / fault.file
    text = file.read_text() if file.is_file() else ""
    found = text.count(fault.old)
    if found != 1:
      out.append(f"{fault.name}: {fault.old!r} stands {found} times in {fault.file}, not once")
      continue
    if "\n" in fault.old + fault.new or fault.old == fault.new:
      out.append(f"{fault.name}: a fault changes one line")
    try:
      compile(planted(text, fault), str(file), "exec")
    except SyntaxError as error:
      out.append(f"{fault.name}: {fault.file} is no Python with it ({error})")
    out += [f"{fault.name}: there is no tests/{t}" for t in fault.tests if not (root / "tests" / t).exists()]
  return out


def planted(text: str, fault: Fault) -> str:
  """The text of a file with the fault in it."""
  return text.replace(fault.old, fault.new)


def outermost(paths: Iterable[str]) -> list[str]:
  """Paths below `tests`, without those that lie in another one."""
  found = sorted(set(paths))
  return [p for p in found if not any(p.startswith(f"{other}/") for other in found)]


# -------------------------------------------------------------------------------------------------------- a checkout


class Copy:
  """A copy of the checkout in a folder, in which one fault at a time is planted."""

  def __init__(self, folder: pathlib.Path, timeout: float):
    self._root, self._timeout = folder, timeout
    self._running: subprocess.Popen[bytes] | None = None
    for name in COPIED:
      source = ROOT / name
      if source.is_dir():
        shutil.copytree(source, folder / name)  # with the times of its files, so that compiled modules stay good
      elif source.exists():
        shutil.copy2(source, folder / name)
    (ROOT / ".cache").mkdir(exist_ok=True)
    (folder / ".cache").symlink_to(ROOT / ".cache")
    self._check()

  @property
  def _environment(self) -> dict[str, str]:
    before = os.environ.get("PYTHONPATH")
    path = str(self._root) + (os.pathsep + before if before else "")
    # A module with a fault must leave no compiled file behind: it may be as long, and as old, as the one without.
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}

  def _check(self) -> None:
    """Raises RuntimeError unless the copy's package is the one that processes import."""
    command = [sys.executable, "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)"]
    with tempfile.TemporaryDirectory() as elsewhere:
      out = subprocess.run(
        command, cwd=elsewhere, env=self._environment, capture_output=True, text=True, check=True
      ).stdout
    if self._root not in pathlib.Path(out.strip()).parents:
      raise RuntimeError(f"processes import {out.strip()}, not the copy in {self._root}")

  def tests(self, paths: Sequence[str], marks: str, *, first: bool = True) -> Run:
    """Runs the tests at paths below `tests`; with `first` up to the first failure."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks]
    command += [*(["-x"] if first else []), *(f"tests/{p}" for p in paths)]
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
      self._running = process = subprocess.Popen(
        command, cwd=self._root, env=self._environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
      )
      try:
        code = process.wait(self._timeout)
      except subprocess.TimeoutExpired:
        return Run(CAUGHT, f"no end in {self._timeout:g} s", time.monotonic() - begun)
      finally:
        self.stop()
      output.seek(0)
      verdict, by = judged(code, output.read(), all_=not first)
    return Run(verdict, by, time.monotonic() - begun)

  def stop(self) -> None:
    """Ends the tests that run, and what they started."""
    process = self._running
    if process is not None and process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()

  def with_fault(self, fault: Fault, marks: str) -> Run:
    """Runs the tests of a fault's part with the fault."""
    file = self._root / PACKAGE / fault.file
    text, times = file.read_text(), file.stat()
    try:
      file.write_text(planted(text, fault))
      return self.tests(fault.tests, marks)
    finally:
      file.write_text(text)
      os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def judged(code: int, output: str, *, all_: bool = False) -> tuple[str, str]:
  """What an exit code of pytest means, and the first test that failed (`all_`: all), or the last line."""
  failed = _FAILED.findall(output)
  last = next((line for line in reversed(output.splitlines()) if line.strip()), "no output")
  named = ", ".join(failed if all_ else failed[:1]) or last
  if code == 0:
    return MISSED, ""
  if code == 1:
    return CAUGHT, named
  if code == 2 and "during collection" in output:  # a module of tests, or what it imports, does not load
    return CAUGHT, f"{named} (at collection)"
  return BROKEN, f"pytest ended with {code}: {last}"


# -------------------------------------------------------------------------------------------------------------- runs


def try_out(fault: Fault, copy: Copy, *, quick: bool) -> Result:
  """Plants a fault and runs the quick tier of its part and, unless that notices it or `quick`, all tests of it."""
  result = Result(fault, copy.with_fault(fault, QUICK))
  if result.quick.verdict == MISSED and not quick:
    result.whole = copy.with_fault(fault, WHOLE)
  return result


def run(faults: Sequence[Fault], copies: Sequence[Copy], *, quick: bool) -> list[Result]:
  """Tries faults out, as many side by side as there are copies, and tells of each."""
  free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
  for copy in copies:
    free.put(copy)
  lock, results = threading.Lock(), list[Result]()

  def one(fault: Fault) -> None:
    copy = free.get()
    try:
      result = try_out(fault, copy, quick=quick)
    finally:
      free.put(copy)
    with lock:
      results.append(result)
      print(f"[{len(results):>3}/{len(faults)}] {told(result)}", flush=True)

  with futures.ThreadPoolExecutor(len(copies)) as pool:
    waiting = [pool.submit(one, fault) for fault in faults]
    try:
      for each in waiting:
        each.result()
    except BaseException:  # the first error, Ctrl-C or SIGTERM is enough
      pool.shutdown(wait=False, cancel_futures=True)
      for copy in copies:
        copy.stop()
      raise
  place = {fault.name: i for i, fault in enumerate(faults)}
  return sorted(results, key=lambda r: place[r.fault.name])


def told(result: Result) -> str:
  """A line of what became of a fault."""
  parts = []
  for tier, each in ((QUICK, result.quick), (WHOLE, result.whole)):
    if each is not None:
      parts.append(f"{each.verdict} by the {TIERS[tier]} in {each.seconds:.0f} s" + (f": {each.by}" if each.by else ""))
  return f"{result.fault.name}: " + "; ".join(parts)


def table(results: Sequence[Result], *, quick: bool) -> list[str]:
  """What became of all faults, in lines."""
  width = max(len(r.fault.name) for r in results)
  lines = [f"{'fault':<{width}}  quick   whole   noticed by", f"{'─' * width}  ──────  ──────  ──────────"]
  for r in results:
    last = r.whole or r.quick
    whole = r.whole.verdict if r.whole is not None else "–"
    lines.append(f"{r.fault.name:<{width}}  {r.quick.verdict:<6}  {whole:<6}  {last.by or r.fault.hurts}")
  by_quick, by_any = sum(r.quick.verdict == CAUGHT for r in results), sum(r.caught for r in results)
  said = f"quick tier: caught {by_quick} of {len(results)}"
  return [*lines, "", said if quick else f"{said}; whole suite: caught {by_any} of {len(results)}"]


def as_json(results: Sequence[Result]) -> str:
  """The same for machines."""

  def entry(result: Result) -> dict[str, object]:
    runs = {"quick": result.quick, "whole": result.whole}
    return {**result.fault._asdict(), **{k: v and dataclasses.asdict(v) for k, v in runs.items()}}

  return json.dumps([entry(r) for r in results], indent=1) + "\n"


def main() -> int:
  """Runs the command."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workers", type=int, default=2, help="faults tried side by side")
  parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression for names and files of faults")
  parser.add_argument("--list", action="store_true", help="lists the faults and what they would hurt")
  parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="writes the results")
  parser.add_argument("--quick", action="store_true", help="does without the whole suite")
  parser.add_argument("--no-baseline", action="store_true", help="does not run the tests without a fault first")
  parser.add_argument("--timeout", type=float, default=900.0, help="seconds of a run; one without an end is caught")
  asked = parser.parse_args()
  faults = [f for f in FAULTS if re.search(asked.only, f"{f.name} {f.file}", re.IGNORECASE)]
  if wrong := problems(faults):
    print("\n".join(wrong), file=sys.stderr)
    return 2
  if asked.list or not faults:
    print("\n".join(f"{f.name}  [{f.file}]\n    {f.hurts}" for f in faults) or "no fault has such a name")
    return 0 if faults else 2
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))  # so that nothing is left behind
  with tempfile.TemporaryDirectory(prefix="mutations-", ignore_cleanup_errors=True) as folder:
    copies = []
    for i in range(max(1, min(asked.workers, len(faults)))):
      (here := pathlib.Path(folder).resolve() / str(i)).mkdir()
      copies.append(Copy(here, asked.timeout))
    if not asked.no_baseline:
      parts = outermost(t for f in faults for t in f.tests)
      print(f"without a fault: {', '.join(parts)}", flush=True)
      base = copies[0].tests(parts, QUICK, first=False)
      if base.verdict != MISSED:
        print(f"without a fault the tests fail: {base.by}", file=sys.stderr)
        return 2
      print(f"all pass, in {base.seconds:.0f} s", flush=True)
    results = run(faults, copies, quick=asked.quick)
  print("\n" + "\n".join(table(results, quick=asked.quick)))
  if asked.json is not None:
    asked.json.write_text(as_json(results))
  if any(BROKEN in (r.quick.verdict, r.whole and r.whole.verdict) for r in results):
    return 2
  return 0 if all(r.caught for r in results) else 1


if __name__ == "__main__":
  sys.exit(main())
