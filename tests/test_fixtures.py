"""What the tests themselves stand on: grids of cases, what is made once, and the folder of compiled programs."""

import itertools
import multiprocessing
import pathlib
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures import compilation, grids, scripts
from tests.fixtures.shared import made_once

INTEL = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Xeon
cpu MHz\t\t: 2000.1
flags\t\t: sse avx512f

processor\t: 1
"""


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_every_pair_of_values_is_in_one_of_the_few_cases(sizes: list[int]) -> None:
  axes = [range(size) for size in sizes]
  few = grids.pairwise(axes)
  for i, j in itertools.combinations(range(len(axes)), 2):
    assert {(case[i], case[j]) for case in few} == set(itertools.product(axes[i], axes[j]))
  assert len(few) == len(set(few)) <= len(list(itertools.product(*axes)))


def test_the_whole_grid_is_kept_and_the_rest_of_it_is_nightly() -> None:
  cases = grids.quick_pairs("ab", (1, 2), (True, False))
  assert [c.values for c in cases] == list(itertools.product("ab", (1, 2), (True, False)))
  assert sum(not c.marks for c in cases) == len(grids.pairwise(("ab", (1, 2), (True, False)))) == 4


def test_programs_of_another_processor_or_of_other_flags_are_never_loaded() -> None:
  here = compilation.key(compilation.processor(INTEL), {})
  clocked = INTEL.replace("2000.1", "3999.9").replace("processor\t: 1", "processor\t: 7")
  assert compilation.key(compilation.processor(clocked), {}) == here
  for other in (INTEL.replace(" avx512f", ""), INTEL.replace("Xeon", "Atom"), INTEL.replace("Genuine", "Other")):
    assert compilation.key(compilation.processor(other), {}) != here
  assert compilation.key(compilation.processor(INTEL), {"XLA_FLAGS": "--a"}) != here
  assert compilation.this_processor()


def _make(folder: pathlib.Path) -> None:
  with (folder.parent / "calls").open("a") as calls:
    calls.write("made\n")
  (folder / "whole").write_text("yes")


def _use(factory: pytest.TempPathFactory) -> None:
  assert (made_once(factory, "thing", _make) / "whole").read_text() == "yes"


def test_processes_make_a_shared_folder_once(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
  monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
  monkeypatch.setattr(tmp_path_factory, "getbasetemp", lambda: tmp_path)
  processes = [multiprocessing.get_context("fork").Process(target=_use, args=(tmp_path_factory,)) for _ in range(4)]
  for process in processes:
    process.start()
  for process in processes:
    process.join()
  assert [p.exitcode for p in processes] == [0] * 4
  assert (tmp_path / "shared" / "calls").read_text() == "made\n"


def test_a_shared_folder_that_was_not_finished_is_made_anew(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
  monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
  monkeypatch.setattr(tmp_path_factory, "getbasetemp", lambda: tmp_path)

  def fail(folder: pathlib.Path) -> None:
    (folder / "half").touch()
    raise RuntimeError("no luck")

  with pytest.raises(RuntimeError):
    made_once(tmp_path_factory, "thing", fail)
  folder = made_once(tmp_path_factory, "thing", _make)
  assert [f.name for f in folder.iterdir()] == ["whole"]


def test_every_planted_fault_fits_the_package() -> None:
  command = [sys.executable, str(scripts.ROOT / "tests" / "mutations.py"), "--list"]
  out = subprocess.run(command, capture_output=True, text=True, check=False)
  assert out.returncode == 0, out.stderr
