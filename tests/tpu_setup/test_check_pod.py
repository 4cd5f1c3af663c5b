"""The check of a pod: what it says of processes that fit, that differ, that are missing, gone or hang."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import jax
import pytest

from supermoe_jax import config, hosts
from supermoe_jax.data.dataset import Dataset
from tests.fixtures import scripts

SETUP = scripts.ROOT / "tpu_setup"
sys.path.insert(0, str(SETUP))  # as for a program that lies there

import check_pod  # noqa: E402
import pod_meeting  # noqa: E402
import pod_steps  # noqa: E402
from pod_meeting import Meeting, Reasons, Watch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def free_port() -> int:
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


class Pod:
  """Processes that check a pod together, each with devices of its own."""

  def __init__(self, processes: int, devices: int = 4):
    self._processes, self._port = processes, free_port()
    flags = re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    self._environment = {**os.environ, "XLA_FLAGS": flags}

  def start(self, process: int, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    several = ["--coordinator", f"localhost:{self._port}", "--processes", str(self._processes)]
    return subprocess.Popen(
      [sys.executable, str(SETUP / "check_pod.py"), *several, "--process", str(process), *arguments],
      env={**self._environment, **environment},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )


def ended(processes: Sequence[subprocess.Popen[str]], code: int) -> list[str]:
  outputs = [p.communicate(timeout=240)[0] for p in processes]
  assert [p.returncode for p in processes] == [code] * len(processes), "\n".join(outputs)
  return outputs


def line(output: str, start: str) -> str:
  (found,) = [each for each in output.splitlines() if each.startswith(start)]
  return found


# ------------------------------------------------------------------------------------------------------ whole commands


@pytest.mark.slow
def test_two_processes_that_fit_are_right_and_everything_is_measured(tmp_path: pathlib.Path) -> None:
  pod, file = Pod(2), tmp_path / "pod.json"
  arguments = ["--sizes", "0.0625", "0.5", "--json", str(file)]
  outputs = ended([pod.start(i, *arguments) for i in range(2)], 0)
  host = socket.gethostname()
  assert all(line(outputs[0], f"process {i}").startswith(f"process {i}, {host}: OK") for i in range(2))
  assert line(outputs[1], "process 1").startswith(f"process 1, {host}: OK")
  assert "the pod is right" in outputs[0] and "training: mesh 2×4×1" in outputs[0]
  told = json.loads(file.read_text())
  assert told["right"] and [each["wrong"] for each in told["verdict"]] == [None, None]
  assert all((d["local"], d["all"], d["processes"], d["wrong"]) == (4, 8, 2, []) for d in told["devices"])
  assert told["facts"][0]["versions"]["jax"] == jax.__version__
  measured = {(row["operation"], row["scope"], row["bytes"]): row for row in told["collectives"]}
  assert len(measured) == 2 * 2 * 2  # operations, scopes, sizes
  for (operation, scope, size), row in measured.items():
    n = 8 if scope == "all devices" else 4
    assert row["devices"] == n and size in (1 << 16, 1 << 19) and len(row["seconds"]) == 2
    assert row["algorithm_gbs"] == pytest.approx(size / max(row["seconds"]) / 1e9)
    factor = (2 if operation == "all-reduce" else 1) * (n - 1) / n
    assert row["bus_gbs"] == pytest.approx(row["algorithm_gbs"] * factor)
  first, second = told["training"]["processes"]
  assert first["losses"] == second["losses"] and len(first["losses"]) == 2
  assert 0 < first["seconds"][1] < first["seconds"][0]  # the first one compiles


@pytest.mark.slow
def test_another_version_and_another_config_are_named_before_a_backend_is_touched(
  cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path
) -> None:
  config.save(cfg, tmp_path / "wanted.json")
  (tmp_path / "wanted.py").write_text(
    "import json, ml_collections\n"
    "def get_config():\n"
    f"  return ml_collections.ConfigDict(json.load(open({str(tmp_path / 'wanted.json')!r})))\n"
  )
  (tmp_path / "jax-0.0.1.dist-info").mkdir()
  (tmp_path / "jax-0.0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: jax\nVersion: 0.0.1\n")
  # A platform that is not there: to ask for a device would be an error.
  pod, given = Pod(3), ["--config", str(tmp_path / "wanted.py"), "--json", str(tmp_path / "pod.json")]
  processes = [
    pod.start(0, *given, JAX_PLATFORMS="none"),
    pod.start(1, *given, JAX_PLATFORMS="none", PYTHONPATH=str(tmp_path)),
    pod.start(2, *given, "--config.train.seed=5", JAX_PLATFORMS="none"),
  ]
  outputs = ended(processes, 1)
  host, other = socket.gethostname(), config.override(cfg, ["--config.train.seed=5"])
  assert line(outputs[0], "process 0") == f"process 0, {host}: OK"
  assert f"process 1, {host}: WRONG: jax 0.0.1, the others have {jax.__version__}; install the same" in outputs[0]
  told = f"process 2, {host}: WRONG: config {other.hash()}, the others have {cfg.hash()} (config.train.seed: 0 → 5)"
  assert told in outputs[0]
  assert "process 1" in outputs[1] and "0.0.1" in outputs[1] and "config.train.seed" in outputs[2]
  written = json.loads((tmp_path / "pod.json").read_text())
  assert not written["right"] and "devices" not in written
  assert {each["dataset"] for each in written["facts"]} == {dataset.manifest["encoding_hash"]}


@pytest.mark.slow
def test_a_process_that_does_not_come_is_named_in_time() -> None:
  (output,) = ended([Pod(2).start(0, "--timeout", "3", JAX_PLATFORMS="none")], 1)
  assert f"process 0, {socket.gethostname()}: not known" in output
  assert "process 1: WRONG: did not come within 3 s; give the same command there" in output


@pytest.mark.slow
def test_a_process_alone_checks_its_host() -> None:
  outputs = ended([Pod(1, devices=1).start(0, "--sizes", "0.5")], 0)
  assert "one process" in outputs[0] and "training: mesh 1×1×1" in outputs[0] and "the pod is right" in outputs[0]


# ------------------------------------------------------------------------------------------------- meeting and watching


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(pod_meeting, "GRACE", 0.3)


class Met:
  """Processes of a meeting, in threads of this one, and with what reasons it ended for each."""

  def __init__(self, *numbers: int, of: int, seconds: float = 2.0):
    coordinator = f"localhost:{free_port()}"
    self.ends: list[tuple[int, Reasons]] = []
    self.all = [Meeting(hosts.Place(coordinator, of, i), seconds, self._ended(i)) for i in numbers]
    self.each(lambda meeting: meeting.open())

  def _ended(self, process: int):
    def ended(reasons: Reasons) -> NoReturn:
      self.ends.append((process, reasons))
      raise SystemExit(1)  # of this thread; a process would be over

    return ended

  def each(self, does: Callable[[Meeting], object]) -> None:
    threads = [threading.Thread(target=does, args=(meeting,), daemon=True) for meeting in self.all]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(20)

  def wait(self) -> dict[int, Reasons]:
    """What all were told, once all were."""
    end = time.monotonic() + 20
    while len(self.ends) < len(self.all) and time.monotonic() < end:
      time.sleep(0.01)
    return dict(self.ends)


def test_processes_hear_each_other_and_leave_the_coordinators_port() -> None:
  met, said = Met(0, 1, of=2), {}
  for round_ in range(3):
    met.each(lambda m, r=round_: said.update({(m.process, r): m.gather({"from": m.process, "round": r})}))
  assert all(said[i, r] == [{"from": j, "round": r} for j in range(2)] for i in range(2) for r in range(3))
  assert abs(met.all[0].clocks[1]) < 1
  port = int(met.all[0]._address.rpartition(":")[2])
  with socket.create_server(("", port)):  # JAX' coordinator can have it
    met.each(lambda m: said.update({(m.process, 3): m.gather(m.process)}))
  assert said[0, 3] == said[1, 3] == [0, 1]
  met.each(lambda m: m.close())
  time.sleep(0.2)
  assert not met.ends


def test_a_process_that_ends_the_check_ends_it_for_all_with_its_reason() -> None:
  met = Met(0, 1, 2, of=3)
  with pytest.raises(SystemExit):
    met.all[1].stop({1: "hangs"})
  assert met.wait() == {i: {1: "hangs"} for i in range(3)}


def test_all_are_told_who_does_not_come() -> None:
  found = Met(0, 2, of=3, seconds=1.0).wait()
  assert found.keys() == {0, 2} and found[0] == found[2] and found[0].keys() == {1}
  found = Met(1, of=2, seconds=0.5).wait()
  assert "did not come" in found[1][0]


def test_a_process_that_is_gone_is_named_with_its_step() -> None:
  met = Met(0, 1, of=2)
  met.all[1].note("something")
  while 1 not in met.all[0].steps:
    time.sleep(0.01)
  met.all[1]._lines[0].shutdown(socket.SHUT_WR)
  assert met.wait()[0] == {1: "is gone, in step 'something'"}


def test_when_all_hang_the_silent_one_is_the_reason() -> None:
  met = Met(0, 1, 2, of=3)
  met.all[2].alive()
  met.all[2].note("a collective")
  while 2 not in met.all[0].steps:
    time.sleep(0.01)
  met.all[0]._heard[2] -= 100
  met.each(lambda m: m.hang("hangs") if m.process < 2 else None)
  assert met.wait() == {i: {2: "no sign of life for 100 s, in step 'a collective'"} for i in range(3)}
  met = Met(0, 1, of=2)
  met.each(lambda m: m.hang("hangs") if m.process else None)
  assert met.wait() == {i: {1: "hangs"} for i in range(2)}


def test_two_with_one_number_and_one_of_another_number_are_told() -> None:
  assert "there are two" in Met(0, 1, 1, of=3).wait()[0][1]
  met = Met(0, of=1)
  met.all = [Meeting(hosts.Place(f"localhost:{(port := free_port())}", 2, 0), 2.0, met._ended(0))]
  met.all.append(Meeting(hosts.Place(f"localhost:{port}", 4, 3), 2.0, met._ended(3)))
  met.each(lambda meeting: meeting.open())
  assert "is one of 4 processes, the first of 2" in met.wait()[0][3]


def test_what_is_no_process_of_the_check_is_let_be_and_told_from_one() -> None:
  port, ends = free_port(), []

  def ended(reasons: Reasons) -> NoReturn:
    ends.append(reasons)
    raise SystemExit(1)

  first = Meeting(hosts.Place(f"localhost:{port}", 2, 0), 1.5, ended)
  thread = threading.Thread(target=first.open, daemon=True)
  thread.start()
  time.sleep(0.3)
  with socket.create_connection(("localhost", port)) as stranger:
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert stranger.recv(10) == b""
  thread.join(20)
  assert ends[0].keys() == {1} and "did not come" in ends[0][1]
  with socket.create_server(("localhost", port)) as other:
    second = Meeting(hosts.Place(f"localhost:{port}", 2, 1), 1.0, ended)
    thread = threading.Thread(target=second.open, daemon=True)
    thread.start()
    other.accept()[0].close()
    thread.join(20)
  assert "something else answers there" in ends[1][0]


def test_what_hangs_is_named_and_shows_its_stack() -> None:
  program = (
    "import time, pod_meeting\n"
    "watch = pod_meeting.Watch(0.3, print, lambda step: print('hangs in', step, flush=True))\n"
    "def stuck():\n"
    "  time.sleep(60)\n"
    "with watch.step('quick'):\n"
    "  pass\n"
    "time.sleep(0.5)\n"
    "with watch.step('slow one'):\n"
    "  stuck()\n"
  )
  out = subprocess.run(
    [sys.executable, "-c", program], cwd=SETUP, capture_output=True, text=True, check=False, timeout=30
  )
  assert out.returncode == 1
  assert (
    "hangs in slow one" in out.stdout and "in stuck" in out.stderr and "'slow one': nothing for 0.3 s" in out.stderr
  )


def test_a_step_in_time_is_let_be() -> None:
  hung: list[str] = []
  watch = Watch(30, lambda step: None, hung.append)
  with watch.step("a"):
    pass
  time.sleep(0.3)
  assert not hung


# --------------------------------------------------------------------------------------------------------- pure logic


def fact(**changes) -> Mapping:
  base = {"versions": {"jax": "1"}, "code": "c", "config": None, "config_hash": None, "dataset": None, "problems": []}
  return {**base, **changes}


def test_the_majority_is_what_most_have_and_of_two_the_first() -> None:
  assert check_pod.majority(["a", "b", "b"]) == "b"
  assert check_pod.majority(["a", "b"]) == "a"
  assert check_pod.majority([None, {"k": [1]}, {"k": [1]}]) == {"k": [1]}


def test_facts_that_differ_are_named_with_a_remedy() -> None:
  assert check_pod.compare([fact(), fact()]) == {}
  wrong = check_pod.compare([fact(versions={"jax": "0"}), fact(), fact(code="d")])
  assert wrong.keys() == {0, 2}
  assert wrong[0] == f"jax 0, the others have 1; {check_pod.REMEDIES['versions']}"
  assert wrong[2] == f"code d, the others have c; {check_pod.REMEDIES['code']}"
  assert "libtpu missing" in check_pod.compare([fact(versions={"jax": "1", "libtpu": "2"}), fact()])[1]
  wrong = check_pod.compare([fact(dataset="x"), fact(dataset="y"), fact(problems=["no dataset at /data"])])
  assert wrong == {1: f"dataset y, the others have x; {check_pod.REMEDIES['dataset']}", 2: "no dataset at /data"}
  both = [fact(config={"a": 1}, config_hash="h"), fact()]
  assert "not all have --config" in check_pod.compare(both)[1]


def test_a_host_that_cannot_read_its_config_or_dataset_says_why(cfg: config.Config, tmp_path: pathlib.Path) -> None:
  assert "no such file" in check_pod.facts(str(tmp_path / "none.py"), [])["problems"][0]
  config.save(cfg, tmp_path / "wanted.json")
  file = tmp_path / "wanted.py"
  file.write_text(
    "import json, ml_collections\n"
    "def get_config():\n"
    f"  return ml_collections.ConfigDict(json.load(open({str(tmp_path / 'wanted.json')!r})))\n"
  )
  said = check_pod.facts(str(file), [f"--config.data.path={tmp_path / 'nowhere'}"])
  assert "nowhere" in said["problems"][0] and said["dataset"] is None and said["config_hash"]


def test_devices_that_are_not_seen_by_all_or_compute_wrongly_are_named() -> None:
  device = {"platform": "cpu", "kinds": ["cpu"], "local": 4, "all": 8, "processes": 2, "wrong": []}
  assert check_pod.compare_devices([device, device]) == {}
  wrong = check_pod.compare_devices([device, {**device, "all": 4, "processes": 1, "wrong": ["TPU_3"]}])
  assert wrong.keys() == {1} and "sees 4 devices of 1 processes" in wrong[1] and "TPU_3 computes wrongly" in wrong[1]


def test_a_loss_that_is_not_finite_or_not_the_same_is_wrong() -> None:
  fine = {"dataset": "d", "losses": [1.0, 0.5]}
  assert check_pod.compare_training([fine, fine]) == {}
  assert "another dataset" in check_pod.compare_training([fine, {**fine, "dataset": "e"}])[1]
  assert "not finite" in check_pod.compare_training([fine, {**fine, "losses": [1.0, float("nan")]}])[1]
  assert "do not compute the same" in check_pod.compare_training([fine, fine, {**fine, "losses": [1.0, 0.6]}])[2]


def test_a_slow_host_is_told_of_two_as_of_many() -> None:
  assert check_pod.slow([1.0, 1.5]) == []
  assert check_pod.slow([1.0, 2.5]) == [1]
  assert check_pod.slow([3.0, 1.0, 1.1, 0.9]) == [0]


def test_a_mesh_has_all_devices_and_experts_over_two_where_it_can() -> None:
  found = {n: pod_steps.mesh_sizes(n, 1) for n in (1, 2, 3, 4, 8, 12, 16, 256)}
  assert all(m.data * m.expert * m.tensor == n for n, m in found.items())
  assert [m.expert for m in found.values()] == [1, 2, 1, 2, 4, 4, 8, 8]
  assert pod_steps.mesh_sizes(16, 2) == config.Mesh(2, 8, 1, 2)


def test_sizes_are_those_that_there_is_room_for() -> None:
  assert pod_steps.sizes_that_fit([64, 1], 1 << 30) == [1 << 20, 1 << 26]
  assert pod_steps.sizes_that_fit([1, 64], 1 << 24) == [1 << 20]
  assert pod_steps.sizes_that_fit([1, 64], 0) == [1 << 20]


def test_each_device_computes_what_it_must_and_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
  wanted = pod_steps.checksum_wanted()
  assert [pod_steps.checksum(d) for d in jax.local_devices()[:2]] == [wanted] * 2
  a, b, weight = pod_steps._factors()
  changed = a.copy()
  changed[100, 200] += 1
  monkeypatch.setattr(pod_steps, "_factors", lambda: (changed, b, weight))
  assert pod_steps.checksum(jax.local_devices()[0]) != wanted


@pytest.mark.parametrize("operation", pod_steps.OPERATIONS)
def test_a_collective_that_is_wrong_on_a_device_is_seen(operation: str) -> None:
  devices = jax.devices()[:3]
  collective = pod_steps.Collective(operation, devices, 1000)
  assert collective.size == 4 * 3 * (1000 // 12) and collective.wrong() == []
  program = collective._program
  collective.__dict__["_program"] = lambda x, times: program(x, times).at[1, 5].add(1)
  assert collective.wrong() == [str(devices[1])]
