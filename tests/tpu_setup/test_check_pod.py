"""The check of a pod: what it says of processes that fit, that differ, that are missing or compute wrongly."""

import json
import pathlib
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.distributed import processes
from tests.fixtures.pod_checks import Threads, check_pod, config_file, line, name

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

HOST = socket.gethostname()

# ------------------------------------------------------------------------------------------------------ whole commands


@pytest.mark.slow
def test_a_process_alone_checks_its_host_and_measures_everything(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """In this process, with its eight devices."""
  file, threads = tmp_path / "pod.json", Threads(monkeypatch)
  said = threads.run({0: ["--sizes", "0.0625", "0.5", "--json", str(file)]}, of=1)[0]
  assert threads.codes == {0: 0}, said
  assert "one process" in said and "training: mesh 2×4×1" in said and "the pod is right" in said
  assert line(said, "process 0") == f"process 0, {HOST}: OK"
  told = json.loads(file.read_text())
  assert told["right"] and [each["wrong"] for each in told["verdict"]] == [None]
  assert [(d["local"], d["all"], d["processes"], d["wrong"]) for d in told["devices"]] == [(8, 8, 1, [])]
  assert told["facts"][0]["versions"]["jax"] == jax.__version__
  measured = {(row["operation"], row["scope"], row["bytes"]): row for row in told["collectives"]}
  assert measured.keys() == {(o, "all devices", n) for o in ("all-reduce", "all-to-all") for n in (1 << 16, 1 << 19)}
  for (operation, _, size), row in measured.items():
    assert row["devices"] == 8 and len(row["seconds"]) == 1
    assert row["algorithm_gbs"] == pytest.approx(size / max(row["seconds"]) / 1e9)
    factor = (2 if operation == "all-reduce" else 1) * 7 / 8
    assert row["bus_gbs"] == pytest.approx(row["algorithm_gbs"] * factor)
  (trained,) = told["training"]["processes"]
  assert len(trained["losses"]) == 2 and 0 < trained["seconds"][1] < trained["seconds"][0]  # the first one compiles


def test_another_version_and_another_config_are_named_before_a_backend_is_touched(
  cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Processes are threads; the second one's version is not its own."""
  facts = check_pod.facts

  def found(file: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    said = facts(file, overrides)
    if threading.current_thread().name == name(1):
      said["versions"]["jax"] = "0.0.1"
    return said

  def join(place: object) -> None:
    raise AssertionError("a backend is touched")

  threads = Threads(monkeypatch)
  monkeypatch.setattr(check_pod, "facts", found)
  monkeypatch.setattr(processes, "initialize", join)
  given = ["--config", str(config_file(cfg, tmp_path)), "--json", str(tmp_path / "pod.json")]
  said = threads.run({0: given, 1: given, 2: [*given, "--config.train.seed=5"]}, of=3)
  assert threads.codes == {0: 1, 1: 1, 2: 1}, said
  other = config.override(cfg, ["--config.train.seed=5"])
  assert line(said[0], "process 0,") == f"process 0, {HOST}: OK"
  assert f"process 1, {HOST}: WRONG: jax 0.0.1, the others have {jax.__version__}; install the same" in said[0]
  told = f"process 2, {HOST}: WRONG: config {other.hash()}, the others have {cfg.hash()} (config.train.seed: 0 → 5)"
  assert told in said[0] and "the pod is not right" in said[0]
  assert "process 1" in said[1] and "0.0.1" in said[1] and "config.train.seed" in said[2]
  written = json.loads((tmp_path / "pod.json").read_text())
  assert not written["right"] and "devices" not in written
  assert {each["dataset"] for each in written["facts"]} == {dataset.manifest["encoding_hash"]}


def test_processes_that_do_not_know_of_each_other_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
  """Each one sees eight devices, as where JAX has not joined them."""
  threads = Threads(monkeypatch)
  monkeypatch.setattr(processes, "initialize", lambda place: None)
  said = threads.run({0: [], 1: []}, of=2)
  assert threads.codes == {0: 1, 1: 1}, said
  for process in range(2):
    told = line(said[0], f"process {process},")
    assert told.startswith(f"process {process}, {HOST}: WRONG: sees 8 devices of 1 processes, there are 16 of 2")


def test_a_process_that_does_not_come_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
  threads = Threads(monkeypatch)
  said = threads.run({0: ["--timeout", "0.3"]}, of=2)
  assert threads.codes == {0: 1}
  assert f"process 0, {HOST}: not known" in said[0]
  assert "process 1: WRONG: did not come within 0.3 s; give the same command there" in said[0]


def test_an_error_ends_the_check_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
  def full(*unused: object) -> None:
    raise OSError("No space left on device")

  threads = Threads(monkeypatch)
  monkeypatch.setattr(check_pod, "facts", full)
  said = threads.run({0: []}, of=1)
  assert threads.codes == {0: 1}
  assert f"process 0, {HOST}: WRONG: OSError: No space left on device" in said[0]


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
  file = config_file(cfg, tmp_path)
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
