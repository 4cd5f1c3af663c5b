"""All processes of a run compare the hash of the whole package's code."""

import pathlib
import shutil

import pytest

import supermoe_jax
from supermoe_jax.training.checkpoints.checkpoint import code_hash


@pytest.mark.parametrize("changed", ["errors.py", "layers/moe.py", "data/tasks/labels.py"])
def test_a_change_anywhere_in_the_package_changes_the_hash_of_its_code(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
  package = shutil.copytree(pathlib.Path(supermoe_jax.__file__).parent, tmp_path / "package")
  monkeypatch.setattr(supermoe_jax, "__file__", str(package / "__init__.py"))
  before = code_hash()
  assert code_hash() == before
  with (package / changed).open("a") as out:
    out.write("# changed\n")
  assert code_hash() != before
