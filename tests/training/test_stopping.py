"""What hears signals; runs that end before they are done are in `behaviour/test_kill_and_resume.py`."""

import signal
import threading

import pytest

from supermoe_jax.training.stopping import Signals


def test_a_second_interruption_does_not_wait() -> None:
  with Signals() as signals:
    signal.raise_signal(signal.SIGINT)
    assert signals.asked([1]) == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)


def test_outside_the_main_thread_nothing_listens() -> None:
  before, heard = signal.getsignal(signal.SIGTERM), []

  def listen() -> None:
    with Signals() as signals:
      heard.append((signals.asked([1]), signal.getsignal(signal.SIGTERM) == before))

  thread = threading.Thread(target=listen)
  thread.start()
  thread.join()
  assert heard == [("", True)]


def test_signals_are_passed_on_to_the_handlers_there_were_once_nothing_listens() -> None:
  heard: list[int] = []
  before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
  try:
    with Signals() as signals:
      signal.raise_signal(signal.SIGTERM)
      assert (signals.got, signals.asked([1]), heard) == ("SIGTERM", "SIGTERM", [])
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]
  finally:
    signal.signal(signal.SIGTERM, before)
