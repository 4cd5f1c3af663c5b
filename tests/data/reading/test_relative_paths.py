"""Relative paths of a config start from the working directory, and an error names a file next to the config."""

from __future__ import annotations

import os
import pathlib

import pytest

from supermoe_jax import cli
from tests.fixtures.small_log import every_task_config, write_log


def write_config(folder: pathlib.Path, change: tuple[str, str] | None = None) -> pathlib.Path:
  """Writes a config over the small log whose paths are relative, but for one `change` of its text."""
  raw = every_task_config(pathlib.Path("shop"))
  raw["data"]["path"] = str(folder / "dataset")
  text = repr(raw) if change is None else repr(raw).replace(*change)
  file = folder / "config.py"
  file.write_text(
    f"import pathlib, ml_collections\ndef get_config(argument=''):\n  return ml_collections.ConfigDict({text})\n"
  )
  return file


@pytest.mark.parametrize(
  ("name", "key"),
  [
    ("visits", r"config\.data\.sources\.visits\.files"),
    ("users", r"config\.data\.users\.files"),
    ("survey", r"config\.tasks\.survey\.files"),
  ],
)
def test_a_file_next_to_the_config_but_not_here_is_named_with_remedies_that_work(
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
  name: str,
  key: str,
) -> None:
  (tmp_path / "project" / "shop").mkdir(parents=True)
  (tmp_path / "elsewhere" / "shop").mkdir(parents=True)
  for place in ("project", "elsewhere"):
    write_log(tmp_path / place / "shop", users=20)
  (tmp_path / "elsewhere" / "shop" / f"{name}.parquet").unlink()
  config_file = write_config(tmp_path / "project")
  monkeypatch.chdir(tmp_path / "elsewhere")
  relative = os.path.relpath(config_file)
  assert cli.main(["prepare", "--config", relative]) == 1
  said = capsys.readouterr().err
  there = pathlib.Path(relative).parent / "shop" / f"{name}.parquet"
  remedy = f"str(pathlib.Path(__file__).parent / 'shop/{name}.parquet')"
  assert key.replace("\\", "") in said and f"but there is {there}, next to the config file" in said and remedy in said
  write_config(tmp_path / "project", (f"'shop/{name}.parquet'", remedy))
  assert cli.main(["prepare", "--config", f"{relative}:argument"]) == 0
  write_config(tmp_path / "project")
  monkeypatch.chdir(tmp_path / "project")
  assert cli.main(["prepare", "--config", "config.py", "--overwrite"]) == 0
