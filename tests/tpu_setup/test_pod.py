"""pod.sh on a pod whose hosts are folders of this machine: what it says, refuses, and really does."""

import pathlib
import re
import signal
import subprocess
import time

import pytest

from tests.fixtures.pod_scripts import ROOT, Machine

POD = "tpu_setup/pod.sh"

# Stands for gcloud: a slice is a folder of HOSTS, a worker a folder in it, a bucket a folder of BUCKETS.
_GCLOUD = r"""#!/usr/bin/env bash
printf '%s\0' "${0##*/}" "$@" >"$CALLS/$(date +%s%N)-$$"
here() { case "$1" in gs://*) echo "$BUCKETS/${1#gs://}" ;; *) echo "$1" ;; esac; }
option() {
  local name=$1 last=""
  for word in "${@:2}"; do [ "$last" != "$name" ] || echo "$word"; last=$word; done
}
case "$*" in
  *" describe "*) state=$(head -n 1 "$STATES"); sed -i 1d "$STATES"; echo "$state" ;;
  "storage rsync "*)
    source=$(here "$4") target=$(here "$5")
    mkdir -p "$target" && cp -r "$source/." "$target/"
    [ -z "${LOSE:-}" ] || rm -f "$target/$LOSE"
    ;;
  "storage du "*) folder=$(here "${3%/**}"); find "$folder" -type f -exec stat -c "%s gs://%n" {} + ;;
  *" tpu-vm scp "*)
    target=${6#*:}
    mkdir -p "$(dirname "$target")" && cp "$5" "$target"
    ;;
  *" tpu-vm ssh "*)
    worker=$(option --worker "$@") command=$(option --command "$@") code=0 jobs=()
    [ "$worker" != all ] || worker='*'
    for host in "$HOSTS/$5"/$worker/; do
      (cd "$host" && HOME=$host exec bash -c "$command") & jobs+=($!)
    done
    trap 'kill ${jobs[*]} 2>/dev/null; exit 143' TERM
    for job in "${jobs[@]}"; do wait "$job" || code=$?; done
    exit "$code"
    ;;
esac
"""

_SUPERMOE = """#!/usr/bin/env bash
trap 'echo saved; exit 75' TERM
while [ $# -gt 1 ]; do [ "$1" != --workdir ] || workdir=$2; shift; done
mkdir -p "$workdir/checkpoints/10"
touch "$workdir/config.json"
echo '{"step": 10, "loss": 1.5}' >"$workdir/metrics.jsonl"
echo "step 10, $(basename "$PWD")"
while :; do sleep 0.1; done
"""

# Scripts that look every second or so whether something has happened look ten times a second.
_SLEEP = "#!/bin/sh\nexec /bin/sleep 0.1\n"

# Fails on the host whose folder holds a file `wrong`.
_PYTHON = """#!/usr/bin/env bash
[ ! -e ../wrong ] || { echo "host is wrong: $*"; exit 1; }
echo "all right: $*"
"""


class Pod(Machine):
  """Two slices of two hosts."""

  def __init__(self, folder: pathlib.Path):
    super().__init__(folder)
    self._program("bin/gcloud", _GCLOUD)
    self._program("bin/sleep", _SLEEP)
    for slice_ in range(2):
      for worker in range(2):
        self._program(f"hosts/mine-{slice_}/{worker}/supermoe_jax/.venv/bin/supermoe", _SUPERMOE)
        self._program(f"hosts/mine-{slice_}/{worker}/supermoe_jax/.venv/bin/python", _PYTHON)
        (self.host(slice_, worker) / "supermoe_jax" / "tpu_setup").symlink_to(ROOT / "tpu_setup")
    self.settings = folder / "pod.env"
    self.workdir = folder / "shared" / "run"
    self.settings.write_text(
      f"# mine\nNAME=mine\nPROJECT='my-project'\nZONE=us-west4-a\nSLICES=2\nSPOT=true\nACCELERATOR=v6e-8\nRUNTIME=r\n"
      f"CONFIG=mine.py\nWORKDIR={self.workdir}\nSHARED={folder / 'shared'}\nBUCKET=gs://bucket\nPOLL=0\n"
    )

  def host(self, slice_: int, worker: int) -> pathlib.Path:
    return self.folder / "hosts" / f"mine-{slice_}" / str(worker)

  def _program(self, name: str, text: str) -> None:
    file = self.folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)

  def variables(self) -> dict[str, str]:
    places = {"HOSTS": "hosts", "BUCKETS": "buckets", "STATES": "states"}
    return {name: str(self.folder / place) for name, place in places.items()}

  def do(self, verb: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return self.run(POD, verb, "--pod", str(self.settings), *arguments, **self.variables(), **variables)


@pytest.fixture
def pod(tmp_path: pathlib.Path) -> Pod:
  return Pod(tmp_path)


def test_a_run_is_launched_looked_at_and_stopped_on_all_hosts_and_resumed_only_then(pod: Pod) -> None:
  out = pod.do("resume")
  assert out.returncode == 1 and out.stderr.count("holds no run that was begun") == 4
  out = pod.do("launch")
  assert out.returncode == 0, out.stderr
  assert out.stdout.count(": started, as process") == 4
  try:
    out = pod.do("launch")  # as a connection that broke makes gcloud do
    assert out.returncode == 0 and out.stdout.count(": runs already, as process") == 4
    end = time.monotonic() + 20
    while not (pod.workdir / "metrics.jsonl").exists():
      assert time.monotonic() < end
      time.sleep(0.05)
    out = pod.do("health")
    assert out.returncode == 0, out.stdout
    for told in ("is alive, since", 'metrics: {"step": 10', "chips: ", "disk free: "):
      assert out.stdout.count(told) >= 4, told
  finally:
    out = pod.do("stop")
  assert out.returncode == 0, out.stderr
  assert out.stdout.count("SIGTERM: no restart") == 4
  for i in range(4):
    (log,) = (pod.host(i // 2, i % 2) / "supermoe_jax" / "runs" / "hosts").glob("*.log")
    assert "saved\n" in log.read_text() and "end 1: code 75" in log.read_text()
  out = pod.do("health")
  assert out.returncode == 1 and out.stdout.count("NO process is alive; the log ends with: run_host:") == 4
  assert pod.do("stop").stdout.count("nothing runs") == 4
  try:
    assert pod.do("resume").stdout.count(": started, as process") == 4
    assert_logs_are_followed_until_interrupted(pod)
  finally:
    pod.do("stop")


def assert_logs_are_followed_until_interrupted(pod: Pod) -> None:
  line = [str(ROOT / POD), "logs", "--pod", str(pod.settings)]
  process = subprocess.Popen(
    line, env=pod.environment(pod.variables()), stdout=subprocess.PIPE, text=True, start_new_session=True
  )
  assert process.stdout
  seen = 0
  for row in process.stdout:
    seen += row.startswith("step 10")
    if seen == 8:  # of the run that was launched, and of the one that goes on with it
      break
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=20) == 130
  end = time.monotonic() + 10
  follow = f"tail -n 50 -F runs/hosts/{str(pod.workdir)[1:].replace('/', '_')}.log"
  while subprocess.run(["pgrep", "-f", follow], capture_output=True, check=False).returncode == 0:
    assert time.monotonic() < end, "something follows the logs still"
    time.sleep(0.05)


def test_one_wrong_host_fails_the_check(pod: Pod) -> None:
  out = pod.do("check", "--", "--config.train.steps=7")
  assert out.returncode == 0
  overrides = "--config.train.mesh.slices=2 --config.train.steps=7"
  assert out.stdout.count(f"all right: tpu_setup/check_pod.py --config mine.py {overrides}\n") == 4
  (pod.host(0, 1) / "wrong").touch()
  out = pod.do("check")
  assert out.returncode == 1 and out.stdout.count("all right") == 3


def test_the_hosts_get_the_pinned_revision(pod: Pod) -> None:
  origin = pod.folder / "origin"
  (origin / "tpu_setup").mkdir(parents=True)
  git = ("git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
  subprocess.run([*git, "init", "--quiet"], check=True)
  revisions = []
  for n in range(2):
    (origin / "tpu_setup" / "host.sh").write_text(f'#!/bin/sh\necho "revision {n}: $*"\nln -sfn ../old/.venv .venv\n')
    (origin / "tpu_setup" / "host.sh").chmod(0o755)
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", str(n)], check=True)
    done = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    revisions.append(done.stdout.strip())
  for i in range(4):  # a fresh host but for its environment
    (pod.host(i // 2, i % 2) / "supermoe_jax").rename(pod.host(i // 2, i % 2) / "old")
  for n in (0, 1, 0):
    out = pod.do("install", "--repository", str(origin), "--revision", revisions[n])
    assert out.returncode == 0, out.stderr
    assert out.stdout.count(f"revision {n}: install --python python3.11\n") == 4
    assert out.stdout.count("all right: tpu_setup/check_pod.py\n") == 4
  out = pod.do("install", "--repository", str(origin), "--revision", "0" * 40)
  assert out.returncode != 0 and "all right" not in out.stdout


def test_what_arrives_is_compared_with_what_was_sent(pod: Pod) -> None:
  source = pod.folder / "dataset"
  (source / "shards").mkdir(parents=True)
  for i in range(3):
    (source / "shards" / f"part {i}").write_text("x" * (100 + i))
  (source / "manifest.json").write_text("{}")
  target = pod.folder / "shared" / "dataset"
  out = pod.do("copy", str(source), str(target))
  assert out.returncode == 0, out.stderr
  assert out.stdout.count(f"{target} holds 4 files, 305 bytes, as sent") == 4
  out = pod.do("copy", f"gs://bucket/mine{target}/", str(pod.folder / "shared" / "again"))
  assert out.returncode == 0 and out.stdout.count("holds 4 files, 305 bytes, as sent") == 4, out.stderr
  out = pod.do("copy", str(source), str(pod.folder / "shared" / "cut"), LOSE="shards/part 1")
  assert out.returncode == 1 and "cut holds 3 files, 204 bytes, not 4 files, 305 bytes" in out.stderr
  out = pod.do("copy", str(source / "manifest.json"), str(pod.folder / "shared" / "manifest.json"))
  assert out.returncode == 0 and out.stdout.count("holds 1 files, 2 bytes, as sent") == 4, out.stderr


def test_create_waits_until_the_slices_are_there(pod: Pod) -> None:
  (pod.folder / "states").write_text("WAITING_FOR_RESOURCES\nWAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\nACTIVE\n")
  out = pod.do("create", "--yes")
  assert out.returncode == 0, out.stderr
  assert re.findall(r"mine is (\w+)", out.stdout) == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
  assert [c[4] for c in pod.calls()] == ["create"] + ["describe"] * 4
  assert "queued resource mine in my-project, us-west4-a: 2 × v6e-8, 16 chips, spot" in out.stderr


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_create_ends_where_they_will_not_come(pod: Pod, state: str) -> None:
  (pod.folder / "states").write_text(f"PROVISIONING\n{state}\n")
  out = pod.do("create", "--yes")
  assert out.returncode == 1
  assert f"mine is {state} and will not come" in out.stderr and "delete" in out.stderr


@pytest.mark.parametrize(
  ("verb", "accelerator", "cost"),
  [
    ("create", "v6e-8", "creates queued resource mine in my-project, us-west4-a: 2 × v6e-8, 16 chips, spot"),
    ("create", "v5p-16", "2 × v5p-16, 16 chips, spot"),
    ("delete", "v6e-8", "deletes queued resource mine in my-project, us-west4-a: 2 × v6e-8, 16 chips, spot"),
  ],
)
def test_what_costs_money_needs_a_yes(pod: Pod, verb: str, accelerator: str, cost: str) -> None:
  out = pod.do(verb, "--accelerator", accelerator)
  assert out.returncode == 2 and out.stdout == ""
  assert cost in out.stderr and "nothing was done; add --yes" in out.stderr
  assert pod.calls() == []


@pytest.mark.parametrize(
  ("arguments", "told"),
  [
    ((), "which verb?"),
    (("start",), "unknown verb start"),
    (("launch", "mine.py"), "unexpected mine.py; what is for supermoe train goes behind --"),
    (("create", "--zones", "a"), "unknown option --zones"),
    (("create", "--zone"), "--zone needs a value"),
    (("create", "--zone", ""), "ZONE is not set; give --zone or a line ZONE=… in the file of --pod"),
    (("create", "--runtime="), "RUNTIME is not set"),
    (("create", "--zone", "us-west4"), "--zone us-west4 is not of the form"),
    (("create", "--accelerator", "v5e-8"), "--accelerator v5e-8 is not of the form"),
    (("create", "--slices", "0"), "--slices 0"),
    (("create", "--name", "Mine"), "--name Mine"),
    (("create", "--spot", "yes"), "--spot yes is not of the form ^(true|false)$"),
    (("install",), "REPOSITORY is not set"),
    (("launch", "--workdir", "runs/mine"), "--workdir runs/mine is not of the form ^/"),
    (("launch", "--restarts", "few"), "--restarts few"),
    (("logs", "--slice", "2"), "--slice 2 must be less than SLICES=2"),
    (("logs", "--worker", "first"), "--worker first"),
    (("copy", "README.md"), "copy needs a source and a target"),
    (("copy", "no/such", "/mnt/x"), "there is no no/such"),
    (("copy", "tests", "mnt/x"), "must be an absolute path"),
    (("copy", "tests", "/mnt/x", "--bucket", "bucket"), "--bucket bucket is not of the form ^gs://"),
    (("ssh",), "there is no command"),
  ],
)
def test_wrong_usage_is_told_with_code_2(pod: Pod, arguments: tuple[str, ...], told: str) -> None:
  out = pod.run(POD, *arguments[:1], "--pod", str(pod.settings), *arguments[1:], **pod.variables())
  assert out.returncode == 2 and told in out.stderr and out.stdout == ""
  assert pod.calls() == []


@pytest.mark.parametrize(
  ("line", "told"),
  [("ZONES=us-west4-a", "there is no setting ZONES"), ("ZONE us-west4-a", "line 14: ZONE us-west4-a is not KEY=VALUE")],
)
def test_a_wrong_line_of_the_file_is_named(pod: Pod, line: str, told: str) -> None:
  with pod.settings.open("a") as file:
    file.write(f"{line}\n")
  out = pod.do("health")
  assert out.returncode == 2 and told in out.stderr


def test_the_file_is_not_run(pod: Pod) -> None:
  with pod.settings.open("a") as file:
    file.write(f"NETWORK=$(touch {pod.folder}/harm)\n")
  assert pod.do("create", "--dry-run").returncode == 0
  assert not (pod.folder / "harm").exists()
  out = pod.run(POD, "health", "--pod", "no/such.env")
  assert out.returncode == 2 and "--pod no/such.env cannot be read" in out.stderr


def test_the_example_holds_every_setting() -> None:
  known = re.search(r'known_settings="([^"]*)"', (ROOT / "tpu_setup" / "lib.sh").read_text())
  assert known
  example = re.findall(r"^([A-Z_]+)=", (ROOT / "tpu_setup" / "pod.env.example").read_text(), flags=re.MULTILINE)
  assert sorted({*example, "POLL"}) == sorted(known[1].replace("\\\n", "").split())


def test_no_variable_of_the_environment_is_taken_for_a_setting(pod: Pod) -> None:
  out = pod.run(POD, "wait", ZONE="us-west4-a", NAME="mine", PROJECT="p")
  assert out.returncode == 2 and "NAME is not set" in out.stderr
