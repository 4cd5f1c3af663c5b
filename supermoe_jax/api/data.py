"""Makes a config and a prepared dataset from files or data frames."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from supermoe_jax import config
from supermoe_jax import progress as progress_lib
from supermoe_jax.api.tables import Tables, write_tables
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.inspect import inspect as inspect_lib
from supermoe_jax.data.inspect.inspect import Inspection
from supermoe_jax.data.preparation import prepare as prepare_lib
from supermoe_jax.errors import ConfigError, nearest

Overrides = Mapping[str, Any] | Sequence[str]


def load_config(
  source: str | os.PathLike[str] | Mapping[str, Any] | Inspection,
  overrides: Overrides = (),
  *,
  tables: Tables | None = None,
) -> config.Config:
  """Returns a checked config.

  Args:
    source: a config file with `get_config()`, its settings as a nested mapping, or the result of `inspect`.
    overrides: settings that replace the source's, such as `{"train.steps": 100}` or `["train.steps=100"]`.
    tables: data frames (pandas, polars or Arrow) that replace files, by the name of their source; `users` is the table
      of users. They are written to `DATASET.tables/NAME.parquet`, where DATASET is the config's `data.path`.

  Raises:
    ConfigError: a setting cannot be used; the message names its key and a remedy.
    DataError: a table is not a data frame.
  """
  raw = _raw(source)
  if tables:
    _use_tables(raw, tables)
  cfg = config.resolve(raw)
  given = [f"{key}={value}" for key, value in overrides.items()] if isinstance(overrides, Mapping) else overrides
  return config.override(cfg, ["--config." + text.removeprefix("--config.") for text in given]) if given else cfg


def _raw(source: str | os.PathLike[str] | Mapping[str, Any] | Inspection) -> dict[str, Any]:
  if isinstance(source, Mapping):
    return config.to_dict(source)
  if isinstance(source, Inspection):
    if not source.config:
      raise ConfigError("no config is proposed: no table has a user, a time and a field.")
    with tempfile.TemporaryDirectory() as folder:
      file = pathlib.Path(folder) / "proposed.py"
      file.write_text(source.config)
      return config.read_config(str(file)).to_dict()
  return config.read_config(os.fspath(source)).to_dict()


def _use_tables(raw: dict[str, Any], tables: Tables) -> None:
  """Writes data frames to files, and names these files in a raw config."""
  data = raw.get("data", {})
  sources, path = data.get("sources", {}), data.get("path", "")
  if not path:
    raise ConfigError("config.data.path is empty: name the directory to write the dataset to.")
  known = {**sources, **({"users": data["users"]} if data.get("users") is not None else {})}
  for name in tables:
    if name not in known:
      raise ConfigError(f"tables: the config has no source {name!r}{nearest(name, known)}")
  for name, file in write_tables(tables, pathlib.Path(path + ".tables")).items():
    known[name]["files"] = [str(file)]
    if name in sources:
      known[name]["format"] = "parquet"


def inspect(
  files: str | os.PathLike[str] | Sequence[str] | Tables,
  *,
  format: str = "auto",
  text: config.TextFormat | None = None,
) -> Inspection:
  """Measures event tables and proposes a config; print the result, or pass it to `load_config`.

  Args:
    files: paths, globs or folders, or data frames by name.
    format: the format of the files: parquet, csv, jsonl, …; by default it follows from the ending of a file.
    text: what is known of how text files are written; the rest is guessed.

  Raises:
    DataError: a file is missing or cannot be read, or there is no row at all.
  """
  if not isinstance(files, Mapping):
    listed = [os.fspath(files)] if isinstance(files, str | os.PathLike) else list(files)
    return inspect_lib.inspect(listed, format, text or config.TextFormat())
  with tempfile.TemporaryDirectory() as folder:
    paths = write_tables(files, pathlib.Path(folder))
    found = inspect_lib.inspect([str(path) for path in paths.values()])
    # The files are deleted with the folder, so the findings name them as `load_config(…, tables=…)` will.
    named = tuple(dataclasses.replace(t, files=tuple(pathlib.Path(f.name) for f in t.files)) for t in found.tables)
    return dataclasses.replace(found, tables=named, config=found.config.replace(f"{folder}/", ""))


def prepare(cfg: config.Config, *, overwrite: bool = False, progress: bool = False) -> Dataset:
  """Prepares the dataset at `cfg.data.path`, or opens the one that was prepared from the same config.

  Args:
    cfg: the config.
    overwrite: whether to replace a dataset of another config.
    progress: whether to show bars.

  Raises:
    DataError: the data cannot be used; the message names file, column and value.
    ConfigError: the split does not fit the log.
  """
  with progress_lib.shown(progress):
    prepare_lib.prepare(cfg, overwrite=overwrite)
  return Dataset(cfg.data.path)
