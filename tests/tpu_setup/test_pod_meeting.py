"""How the processes of a pod meet without JAX: what all are told of one that is missing, gone, silent or hangs."""

import socket
import subprocess
import sys
import threading
import time
from typing import NoReturn

import pytest

from supermoe_jax.distributed import processes
from tests.fixtures.pod_checks import GRACE, SETUP, Met, free_port, pod_meeting

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

Meeting = pod_meeting.Meeting

# What a meeting waits for one that does not come: enough for those that do.
SOON = 0.7


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(pod_meeting, "GRACE", GRACE)


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
  found = Met(0, 2, of=3, seconds=SOON).wait()
  assert found.keys() == {0, 2} and found[0] == found[2] and found[0].keys() == {1}
  found = Met(1, of=2, seconds=0.3).wait()
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
  assert "there are two" in Met(0, 1, 1, of=3, seconds=SOON).wait()[0][1]
  met = Met(0, of=1)
  port = free_port()
  met.all = [Meeting(processes.Place(f"localhost:{port}", 2, 0), SOON, met.ended(0))]
  met.all.append(Meeting(processes.Place(f"localhost:{port}", 4, 3), SOON, met.ended(3)))
  met.each(lambda meeting: meeting.open())
  assert "is one of 4 processes, the first of 2" in met.wait()[0][3]


def test_what_is_no_process_of_the_check_is_let_be_and_told_from_one() -> None:
  port, ends = free_port(), []

  def ended(reasons: pod_meeting.Reasons) -> NoReturn:
    ends.append(reasons)
    raise SystemExit(1)

  first = Meeting(processes.Place(f"localhost:{port}", 2, 0), SOON, ended)
  thread = threading.Thread(target=first.open, daemon=True)
  thread.start()
  with connected(port) as stranger:
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert stranger.recv(10) == b""
  thread.join(20)
  assert ends[0].keys() == {1} and "did not come" in ends[0][1]
  with socket.create_server(("localhost", port)) as other:
    second = Meeting(processes.Place(f"localhost:{port}", 2, 1), SOON, ended)
    thread = threading.Thread(target=second.open, daemon=True)
    thread.start()
    other.accept()[0].close()
    thread.join(20)
  assert "something else answers there" in ends[1][0]


def connected(port: int) -> socket.socket:
  """Connects as soon as somebody listens."""
  end = time.monotonic() + 10
  while True:
    try:
      return socket.create_connection(("localhost", port))
    except OSError:
      assert time.monotonic() < end
      time.sleep(0.01)


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
