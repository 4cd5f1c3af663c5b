"""What every script would do, compared with the files of expected/.

After a change that is meant, record them anew, and read the difference before it is committed:

    .venv/bin/python tests/tpu_setup/test_dry_runs.py && git diff tests/tpu_setup/expected
"""

import pathlib
import re
import shlex
import subprocess
import tempfile

import pytest

from tests.fixtures.pod_scripts import ROOT, SCRIPTS, Machine

EXPECTED = pathlib.Path(__file__).parent / "expected"

_ONE = ("--pod", "tpu_setup/pod.env.example")
_TWO = (*_ONE, "--slices", "2", "--spot", "true", "--accelerator=v4-32", "--runtime", "tpu-ubuntu2204-base")
_HARD = ("--", "--config.train.mesh.data=16", "--config.exclude_tasks=('demo_*', 'it''s \"one\" $HOME')")
_RUN = ("--workdir", "/mnt/shared/runs/mine")


def _cases() -> dict[str, tuple[str, ...]]:
  found: dict[str, tuple[str, ...]] = {}
  for verb in ("create", "wait", "install", "check", "launch", "resume", "logs", "health", "stop", "delete"):
    hard = _HARD if verb in ("check", "launch", "resume") else ()
    found[f"pod_{verb}"] = ("pod.sh", verb, *_ONE, *hard)
    found[f"pod_{verb}_two_slices"] = ("pod.sh", verb, *_TWO, *hard)
  found["pod_install_mounted"] = ("pod.sh", "install", *_ONE, "--shared-source", "")
  found["pod_create_network"] = ("pod.sh", "create", *_ONE, "--network", "mine")
  found["pod_logs_one_worker"] = ("pod.sh", "logs", *_TWO, "--worker", "3", "--slice", "1", "--lines", "5")
  found["pod_copy_folder"] = ("pod.sh", "copy", "tpu_setup", "/mnt/shared/dataset", *_TWO)
  found["pod_copy_bucket"] = ("pod.sh", "copy", "gs://theirs/data/", "/mnt/shared/dataset", *_ONE)
  found["pod_copy_file"] = ("pod.sh", "copy", "README.md", "/tmp/read me.md", *_TWO)
  found["pod_copy_file_to_shared"] = ("pod.sh", "copy", "README.md", "/mnt/shared/README.md", *_TWO)
  found["pod_ssh"] = ("pod.sh", "ssh", *_TWO, "--", "df -h | grep 'mnt'")
  for verb in ("create", "render", "launch", "resume", "logs", "health", "stop", "delete"):
    hard = _HARD if verb in ("render", "launch", "resume") else ()
    found[f"gke_{verb}"] = ("gke.sh", verb, *_ONE, *hard)
    found[f"gke_{verb}_two_slices"] = ("gke.sh", verb, *_ONE, "--slices", "2", "--spot", "true", *hard)
  found["gke_render_resume"] = ("gke.sh", "render", "resume", *_ONE)
  found["gke_create_one_host"] = ("gke.sh", "create", *_ONE, "--machine", "ct6e-standard-8t", "--topology", "2x4")
  found["gke_logs_one_worker"] = ("gke.sh", "logs", *_ONE, "--worker", "3", "--slice", "0")
  shared = ("--shared", "/mnt/shared", "--shared-source", "10.0.0.2:/share")
  found["host_install"] = ("host.sh", "install", "--python", "python3.12", *shared)
  found["host_start"] = ("host.sh", "start", *_RUN, "--restarts", "3", "--", "supermoe", "train")
  found["host_logs"] = ("host.sh", "logs", *_RUN)
  found["run_host"] = ("run_host.sh", "--restarts", "3", "--", "supermoe", "train", "--config", "it's mine.py")
  for backend in ("tpu", "cuda", "cpu"):
    found[f"install_{backend}"] = ("install.sh", backend)
  found["install_unchecked"] = ("install.sh", "tpu", "--check", "false")
  found["slurm"] = ("slurm.sbatch", "--config", "mine.py", *_RUN, *_HARD)
  return found


CASES = _cases()


def _dry(machine: Machine, case: str) -> subprocess.CompletedProcess[str]:
  script, *arguments = CASES[case]
  before = arguments.index("--") if "--" in arguments else len(arguments)
  return machine.run(f"tpu_setup/{script}", *arguments[:before], "--dry-run", *arguments[before:])


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_prints_the_commands_as_recorded_and_runs_none(case: str, tmp_path: pathlib.Path) -> None:
  machine = Machine(tmp_path)
  out = _dry(machine, case)
  assert out.returncode == 0, out.stderr
  assert out.stdout == (EXPECTED / f"{case}.txt").read_text()
  assert machine.calls() == []


def test_every_expectation_belongs_to_a_case() -> None:
  assert {p.stem for p in EXPECTED.glob("*.txt")} == set(CASES)


# Those whose every command is gcloud's or kubectl's own, and which start no other script.
_SAME = [c for c in CASES if c.startswith(("pod_", "gke_")) and "render" not in c and "copy" not in c]


@pytest.mark.parametrize("case", _SAME)
def test_a_real_run_calls_what_the_dry_run_printed(case: str, tmp_path: pathlib.Path) -> None:
  machine = Machine(tmp_path)
  script, *arguments = CASES[case]
  before = arguments.index("--") if "--" in arguments else len(arguments)
  out = machine.run(
    f"tpu_setup/{script}",
    *arguments[:before],
    "--yes",
    *arguments[before:],
    STUB_gcloud='case "$*" in *describe*) echo ACTIVE ;; esac',
  )
  assert out.returncode == 0, out.stderr
  lines = (EXPECTED / f"{case}.txt").read_text().splitlines()
  printed = [shlex.split(line.rpartition(" | kubectl ")[2] if "gke.sh render" in line else line) for line in lines]
  printed = [["kubectl", *call] if call[0] == "--context" else call for call in printed]
  assert sorted(machine.calls()) == sorted(printed)  # slices come at once, in any order


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.name != "lib.sh"], ids=lambda p: p.name)
def test_help_is_the_head_of_the_script(script: pathlib.Path, tmp_path: pathlib.Path) -> None:
  out = Machine(tmp_path).run("bash", str(script), "--help")
  assert out.returncode == 0
  assert f"tpu_setup/{script.name} " in out.stdout and "--dry-run" in out.stdout
  assert "source" not in out.stdout.splitlines()[-1]
  for line in out.stdout.splitlines():
    assert f"# {line}".rstrip() in script.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_stops_at_errors_and_is_not_too_long(script: pathlib.Path) -> None:
  lines = script.read_text().splitlines()
  assert len(lines) < 400 and max(map(len, lines)) <= 120
  assert "set -euo pipefail" in lines or script.name == "lib.sh"
  assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


_COMMANDS = re.compile(r"^(?:    |\d+\. `)(tpu_setup/(?:pod|gke)\.sh [^`\n]*)", flags=re.MULTILINE)


@pytest.mark.parametrize("command", _COMMANDS.findall((ROOT / "tpu_setup" / "README.md").read_text()))
def test_a_command_of_the_readme_is_one(command: str, tmp_path: pathlib.Path) -> None:
  command = command.replace("pod.env", "tpu_setup/pod.env.example").replace("runs/mine/dataset", "tpu_setup")
  words = shlex.split(command, comments=True)
  before = words.index("--") if "--" in words else len(words)
  out = Machine(tmp_path).run(*words[:before], "--dry-run", *words[before:])
  assert out.returncode == 0, out.stderr
  assert out.stdout


if __name__ == "__main__":
  EXPECTED.mkdir(exist_ok=True)
  for old in EXPECTED.glob("*.txt"):
    old.unlink()
  with tempfile.TemporaryDirectory() as folder:
    for name in CASES:
      done = _dry(Machine(pathlib.Path(folder)), name)
      if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
      (EXPECTED / f"{name}.txt").write_text(done.stdout)
