"""Imports run down only, layers stand alone, files and folders stay small, and a name means one thing."""

import ast
import collections
import graphlib
import re
import subprocess
import sys

import pytest

from tests.fixtures.imports import PACKAGE, closure, imported, lines, modules, tree
from tests.fixtures.scripts import ROOT

# The rooms from the bottom to the top, with the rooms that each may import from. There is no exception.
ROOMS: dict[str, set[str]] = {
  "errors": set(),
  "environment": set(),
  "progress": set(),
  "batch": set(),
  "atomic_files": {"errors"},
  "sharding": {"errors"},
  "device_mesh": {"errors", "sharding"},
  "config": {"atomic_files", "errors"},
  "distributed": {"config", "errors"},
  "layers": {"sharding"},
  "models": {"batch", "config", "layers", "sharding"},
  "data.encoding": {"batch", "config", "errors"},
  "data.reading": {"config", "data.encoding", "errors", "progress"},
  "data.tasks": {"batch", "config", "data.encoding", "errors"},
  "data.format": {"atomic_files", "batch", "config", "data.encoding", "data.tasks", "errors"},
  "data.dataset": {"batch", "config", "data.encoding", "data.format", "data.reading", "data.tasks", "errors"},
}
DATA = {"batch", "config", "data.encoding", "data.reading", "data.tasks", "data.format", "data.dataset"}
BASE = {"atomic_files", "errors", "progress"}
DEVICES = {"device_mesh", "sharding"}
ROOMS |= {
  "data.preparation": DATA | BASE,
  "data.inspect": {"config", "data.reading", "errors"},
  "data.check": {"batch", "config", "data.dataset", "data.encoding", "data.reading", "errors"},
  "data.append": DATA | BASE | {"data.preparation"},
  "data.beam": DATA | BASE | {"data.preparation"},
  "simulation": {"config", "data.encoding"} | BASE,
  "training": DATA | BASE | DEVICES | {"distributed", "layers", "models"},
  "evaluation": DATA | BASE | DEVICES | {"distributed", "layers", "training"},
  "seesaw": DATA | BASE | {"evaluation", "models", "training"},
  "embeddings": DATA | BASE | DEVICES | {"distributed", "evaluation", "training"},
  "probing": DATA | BASE | DEVICES | {"data.inspect", "embeddings", "environment", "evaluation", "training"},
  "serving": DATA | BASE | {"layers", "training"},
  "plan": DATA | BASE | DEVICES | {"layers", "models", "training"},
  "report": DATA | BASE | {"embeddings", "environment", "evaluation", "models", "seesaw", "training"},
}
ROOMS["api"] = set(ROOMS) - {"data.append", "data.beam", "data.check", "layers", "models", "plan", "simulation"}
ROOMS["cli"] = set(ROOMS) - {"api", "layers", "models", "simulation"}
ROOMS["__main__"] = {"cli"}

# Names that explained nothing, and are gone.
RIDDLES = [
  "roster",
  "lookout",
  "claim",
  "tally",
  "parts",
  "facts",
  "stream",
  "roles",
  "course",
  "words",
  "beside",
  "population",
  "observed",
  "relayout",
  "digest",
  "lines",
  "slots",
  "similar",
  "measuring",
  "questions",
  "proposal",
  "told",
  "around",
  "further",
]


def room(module: str) -> str:
  """The room that a module lies in; rooms of `data` are its sub-packages."""
  path = module.split(".")[1:]
  return ".".join(path[:2]) if path[:1] == ["data"] and len(path) > 1 else path[0] if path else ""


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_run_down_only(module: str) -> None:
  if room(module) == "data":
    assert not imported(module, for_types=True)
    return
  reached = {room(other) for other in imported(module, for_types=True)} - {room(module), ""}
  assert reached <= ROOMS.get(room(module), set()), f"{module} reaches up or into another wing"


def test_rooms_form_no_circle() -> None:
  list(graphlib.TopologicalSorter(ROOMS).static_order())


def test_modules_form_no_circle() -> None:
  list(graphlib.TopologicalSorter({module: imported(module) - {PACKAGE} for module in modules()}).static_order())


def test_layers_load_nothing_of_the_data() -> None:
  script = "import supermoe_jax.layers.moe, supermoe_jax.layers.table, sys; print(*sys.modules)"
  found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
  loaded = {name.split(".")[0] for name in found.stdout.split()}
  assert not loaded & {"duckdb", "grain", "orbax", "pyarrow", "tensorflow_datasets", "ml_collections"}


def test_the_command_shows_its_help_without_jax() -> None:
  script = "import sys; from supermoe_jax import cli; cli._parser().format_help(); print(*sys.modules)"
  found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
  assert not {name.split(".")[0] for name in found.stdout.split()} & {"jax", "numpy", "duckdb", "pyarrow"}


@pytest.mark.parametrize(("module", "files", "most"), [("training.step", 40, 7000), ("layers.moe", 9, 1500)])
def test_few_files_explain_a_step_and_a_layer(module: str, files: int, most: int) -> None:
  found = closure(f"{PACKAGE}.{module}")
  assert len(found) <= files and lines(found) <= most, (len(found), lines(found))


def test_no_file_is_long_and_no_folder_is_full() -> None:
  assert not {n: c for n in modules() if (c := lines({n})) > 400}
  folders = collections.Counter(file.parent for file in modules().values())
  assert not {str(folder): count for folder, count in folders.items() if count > 16}


def test_a_name_of_a_class_or_public_function_means_one_thing() -> None:
  """The Python API names its functions as the rooms do that it calls."""
  homes: dict[str, list[str]] = collections.defaultdict(list)
  for module in modules():
    for node in tree(module).body:
      public = isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
      if (isinstance(node, ast.ClassDef) or public) and room(module) != "api":
        homes[node.name.lstrip("_")].append(module)
  assert not {name: found for name, found in homes.items() if len(found) > 1}


def test_no_module_class_or_function_has_a_name_that_explains_nothing() -> None:
  names = {module.rsplit(".", 1)[-1] for module in modules()}
  for module in modules():
    definitions = ast.ClassDef, ast.FunctionDef
    names |= {node.name for node in ast.walk(tree(module)) if isinstance(node, definitions)}
  assert not {name for name in names if name.lower().strip("_") in RIDDLES}


KIND = r"isinstance\([^)]*\b(NextEvent|EventLabel|FutureEvent|FutureValues|UserLabel|Contrast)\b"


def test_nobody_asks_for_the_kind_of_a_task_by_its_class() -> None:
  homes = ("config.tasks", "data.tasks")
  others = [m for m in modules() if not m.removeprefix(f"{PACKAGE}.").startswith(homes)]
  assert not [m for m in others if re.search(KIND, modules()[m].read_text())]
