"""Runs the scripts of tpu_setup/ beside programs of the same names as gcloud and others, which do nothing but tell."""

import os
import pathlib
import subprocess
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).parents[2]

# Writes its own words, each ended by a zero byte, to a file of the folder CALLS; $STUB_<name> says what else it does.
_STUB = """#!/usr/bin/env bash
printf '%s\\0' "${0##*/}" "$@" >"$CALLS/$(date +%s%N)-$$"
variable="STUB_${0##*/}"
[ -z "${!variable:-}" ] || eval "${!variable}"
"""


class Machine:
  """A place where scripts run, and what they called there."""

  def __init__(self, folder: pathlib.Path, programs: Sequence[str] = ("gcloud", "kubectl", "sudo", "srun", "scontrol")):
    self.folder, self._calls = folder, folder / "calls"
    for each in (self._calls, folder / "bin"):
      each.mkdir(parents=True, exist_ok=True)
    for name in programs:
      (folder / "bin" / name).write_text(_STUB)
      (folder / "bin" / name).chmod(0o755)

  def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
    path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    return {**clean, "PATH": path, "CALLS": str(self._calls), **(more or {})}

  def run(
    self, *command: str, cwd: pathlib.Path = ROOT, timeout: float = 60, **does: str
  ) -> subprocess.CompletedProcess[str]:
    """Runs a script; `does` are further variables, such as `STUB_gcloud`, what a stub does."""
    return subprocess.run(
      command, cwd=cwd, env=self.environment(does), capture_output=True, text=True, check=False, timeout=timeout
    )

  def calls(self) -> list[list[str]]:
    """The words of each call of a stub, oldest first."""
    return [call.read_text().split("\0")[:-1] for call in sorted(self._calls.iterdir())]
