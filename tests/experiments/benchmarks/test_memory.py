"""The benchmark of a head's memory measures what it says, at a size that takes seconds."""

import json
import pathlib
import sys

import pytest

from tests.fixtures import scripts


def test_every_measure_has_a_time_with_a_memory_and_without(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  memory = scripts.load(scripts.BENCHMARKS / "memory.py")
  for name, small in (("ROWS", 2), ("EVENTS", 6), ("SNAPSHOTS", 2), ("DRAWN", 8), ("QUESTIONS", 4), ("CHUNK", 64)):
    monkeypatch.setattr(memory, name, small)
  monkeypatch.setattr(memory, "MOST_FULL", 200)
  file = tmp_path / "found.json"
  monkeypatch.setattr(sys, "argv", ["memory.py", "--items", "300", "100", "--rounds", "1", "--json", str(file)])
  memory.main()
  small, large = json.loads(file.read_text())
  assert (small["items"], large["items"]) == (100, 300)
  assert set(small) == {"items", "rows", "peak", "rank", "sampled", "full"} and "full" not in large
  assert all(t > 0 for of in (small, large) for m in ("rank", "sampled") for t in of[m].values())
  assert small["rows"] < large["rows"] < 1 << 20
  assert capsys.readouterr().out.startswith("100 items: sampled ")
