"""The notebooks run anew from the first cell to the last, and what they print is what is stored in them."""

import functools
import re
import types
from typing import NamedTuple

import nbformat
import pytest

from tests.fixtures import scripts

FOLDER = scripts.ROOT / "notebooks"
STORED = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
NUMBER = r"([+-]?\d+(?:\.\d+)?(?:e[+-]\d+)?)"


def executor() -> types.ModuleType:
  return scripts.load(FOLDER / "execute.py")


def stored(name: str) -> nbformat.NotebookNode:
  return executor().read(name)


@functools.cache
def executed(name: str) -> nbformat.NotebookNode:
  return executor().execute(name)


def numbers(book: nbformat.NotebookNode, pattern: str) -> list[float]:
  """The numbers in the line that `pattern` describes, where each # stands for one; the line is printed once."""
  (found,) = re.findall(re.escape(pattern).replace(r"\#", NUMBER), executor().printed(book))
  return [float(number) for number in (found if isinstance(found, tuple) else (found,))]


class Lift(NamedTuple):
  mean: float
  low: float
  high: float


def lift(book: nbformat.NotebookNode) -> Lift:
  return Lift(*numbers(book, "lift in AUC: # (95 % interval # to #)"))


def test_every_notebook_is_executed_by_these_tests() -> None:
  assert sorted(executor().NAMES) == STORED


@pytest.mark.parametrize("name", STORED)
def test_a_stored_notebook_was_run_from_the_first_cell_to_the_last(name: str) -> None:
  cells = [cell for cell in stored(name).cells if cell.cell_type == "code"]
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  kinds = {output.output_type for cell in cells for output in cell.outputs}
  assert {"stream", "display_data"} <= kinds and "error" not in kinds


@pytest.mark.parametrize("name", STORED)
def test_a_stored_notebook_is_small_and_says_nothing_of_the_machine_it_ran_on(name: str) -> None:
  file = FOLDER / f"{name}.ipynb"
  assert file.stat().st_size < 300 * 1024
  book = stored(name)
  assert not re.findall(r"(?<![\w.:/])/(?:tmp|home|work|root|Users|var|usr)\b\S*", executor().printed(book))
  assert not any("stderr" in output.get("name", "") for cell in book.cells for output in cell.get("outputs", []))
  assert set(book.metadata) == {"kernelspec", "language_info"}


@pytest.mark.slow
@pytest.mark.parametrize("name", STORED)
def test_a_notebook_runs_and_writes_nothing_beside_itself(name: str) -> None:
  kept = stored(name)
  before = {path: path.stat().st_mtime_ns for path in FOLDER.rglob("*")}
  fresh = executed(name)  # raises if a cell fails or warns
  assert {path: path.stat().st_mtime_ns for path in FOLDER.rglob("*")} == before
  assert [len(cell.get("outputs", [])) for cell in fresh.cells] == [len(cell.get("outputs", [])) for cell in kept.cells]


@pytest.mark.slow
def test_embeddings_lift_the_churn_model_and_as_much_as_is_stored() -> None:
  fresh, kept = lift(executed("churn")), lift(stored("churn"))
  assert fresh.low > 0 and kept.low > 0
  assert kept.low < fresh.mean < kept.high


@pytest.mark.slow
def test_a_mixture_errs_less_than_half_as_much_as_a_dense_layer_of_its_active_parameters_or_of_all() -> None:
  for book in (executed("moe_layer"), stored("moe_layer")):
    lines = re.findall(
      r"^(\w.*?) +[\d,]+ parameters in the layer, test error ([\d.]+)$", executor().printed(book), re.M
    )
    error = {name: float(number) for name, number in lines}
    mixture = error.pop("mixture, 2 of 8 experts")
    assert len(error) == 2 and mixture < min(error.values()) / 2


@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one_and_an_upcycled_layer_those_of_its_mlp() -> None:
  for book in (executed("moe_layer"), stored("moe_layer")):
    assert numbers(book, "dropped: # and #") == [0, 0]
    assert numbers(book, "largest difference on the mesh: #")[0] < 1e-5
    assert numbers(book, "largest difference from the MLP at the start: #")[0] < 1e-5
