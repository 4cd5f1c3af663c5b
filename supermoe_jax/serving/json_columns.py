"""Finds out how the columns of a run's event files are written, so that JSON can be read in the same way."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import duckdb
import numpy as np
import pyarrow as pa

from supermoe_jax import config
from supermoe_jax.config.tables import PLAIN_TEXT
from supermoe_jax.data.reading import derived_columns, field_sql, joined_tables, paths, readers, value_sql, vector_sql
from supermoe_jax.data.reading.readers import TableFile
from supermoe_jax.data.reading.text_files import clean_copies
from supermoe_jax.errors import DataError
from supermoe_jax.serving.json_values import ColumnKind, TimeKind
from supermoe_jax.serving.preprocessing import ItemValues
from supermoe_jax.serving.spec import FieldSpec, SourceSpec

_WHOLE = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")
_WIDER = ("integer", "float64", "text")  # kinds for columns of several types: the first that holds them all is taken


def kind_of(type: str, format: str, text: config.TextFormat = PLAIN_TEXT) -> ColumnKind:
  """Returns the kind of a column of this DuckDB type in a file of this format, whose text is written as `text`."""
  if type.endswith("]"):
    element = kind_of(type[: type.rindex("[")], format)
    return ColumnKind(element.name, element.scale, element.zone, element.json, list=True)
  if type in ("VARCHAR", derived_columns.JSON_LIST, derived_columns.JSON_OBJECT) or type.startswith("ENUM"):
    json, nulls = format in readers.JSON_FORMATS, text.null_values
    return ColumnKind("text", json=json, decimal=text.decimal, thousands=text.thousands, nulls=nulls)
  if type.removeprefix("U") in _WHOLE:
    return ColumnKind("integer")
  if decimal := re.fullmatch(r"DECIMAL\(\d+,(\d+)\)", type):
    return ColumnKind("decimal", scale=int(decimal[1]))
  if value_sql.is_instant(type) and type != "DATE":
    return ColumnKind("timestamp", zone="TIME ZONE" in type or "TZ" in type)
  return {
    "BOOLEAN": ColumnKind("boolean"),
    "FLOAT": ColumnKind("float32"),
    "DOUBLE": ColumnKind("float64"),
    "DATE": ColumnKind("date"),
  }.get(type, ColumnKind("exact"))


def common_kind(kinds: Sequence[ColumnKind]) -> ColumnKind:
  """Returns the one kind for a column that has `kinds` in several files."""
  if len(set(kinds)) == 1:
    return kinds[0]
  text = next((k for k in kinds if k.name == "text"), ColumnKind("text"))
  if len({k.list for k in kinds}) == 1:
    for n in range(1, len(_WIDER) + 1):
      if all(k.name in _WIDER[:n] for k in kinds):
        widest = text if _WIDER[n - 1] == "text" else ColumnKind(_WIDER[n - 1])
        return dataclasses.replace(widest, json=any(k.json for k in kinds), list=kinds[0].list)
  return dataclasses.replace(text, json=any(k.json for k in kinds), list=False)


def field_specs(data: config.Data) -> dict[str, FieldSpec]:
  """Returns how the values of each field are read."""
  return {
    n: FieldSpec(
      f.kind == "numeric",
      f.kind == "numeric" and f.encoding == "log1p",
      f.many,
      f.separator,
      f.size if f.kind == "vector" else 0,
    )
    for n, f in data.fields.items()
  }


class ColumnKinds:
  """A lookup, in the event files, of the columns that a config reads."""

  def __init__(self, con: duckdb.DuckDBPyConnection, data: config.Data):
    """Takes a connection of `readers.connect`."""
    self._con, self._data = con, data

  def sources(self) -> tuple[dict[str, SourceSpec], dict[str, ItemValues]]:
    """Returns how each source is read, and the tables of items of sources that have one.

    Raises:
      DataError: a file is missing, or cannot be read.
    """
    specs: dict[str, SourceSpec] = {}
    items: dict[str, ItemValues] = {}
    for name in self._data.sources:
      specs[name], found = self._source(name)
      items |= {name: found} if found else {}
    return specs, items

  def user_columns(self) -> dict[str, ColumnKind]:
    """Returns the kinds of the columns in the table of users that fields read."""
    users = self._data.users
    wanted = {f.column or n for n, f in self._data.fields.items() if f.table == "users"}
    if users is None or not wanted:
      return {}
    files = paths.open_files(
      self._con, users.files, users.format, {users.user, *wanted}, "config.data.users", users
    ).tables
    return {c: _common(files, c) for c in sorted(wanted)}

  def _source(self, name: str) -> tuple[SourceSpec, ItemValues | None]:
    source, key = self._data.sources[name], f"config.data.sources.{name}"
    own, of_users = field_sql.carried(self._data, name), field_sql.carried(self._data, name, "users")
    table = joined_tables.load_items(self._con, self._data, name) if source.items else None
    there = set(table.fields) if table else set()
    wanted = {source.user, source.time, *(c for f, c in own.items() if f not in there)}
    wanted |= {source.items.key} if source.items else set()
    files = paths.open_files(self._con, source.files, source.format, wanted, key, source).tables
    if not files:
      raise DataError(f"{key}.files: no file with a row is left; export where the event files are.")
    # A field of the table of items is read from the events if all their files have its column.
    found = {f: c for f, c in own.items() if f in there and not all(c in file.columns for file in files)}
    columns = {c: _common(files, c) for f, c in own.items() if f not in found}
    item_key = source.items.key if source.items else ""
    items = None
    if table is not None and source.items is not None:
      columns[item_key] = _common(files, item_key)
      file = self._items_file(name, source.items, set(found.values()))
      columns |= {c: kind_of(file.columns[c], file.format, file.text) for c in found.values()}
      items = self._items(table.table, found)
    spec = SourceSpec(
      source.time,
      self._time(files[0], source, key),
      columns,
      {**own, **of_users},
      of_users,
      item_key,
      tuple(sorted(set(found.values()))),
    )
    return spec, items

  def _items_file(self, name: str, items: config.ItemTable, wanted: set[str]) -> TableFile:
    key = f"config.data.sources.{name}.items"
    (file,) = paths.find_files(self._con, [items.file], f"{key}.file")
    return readers.open_table(self._con, file.path, items.format, wanted, items, key)

  def _time(self, file: TableFile, source: config.Source, key: str) -> TimeKind:
    """Returns how a file's times are written, as preparation decides it."""
    type, column = file.columns[file.require(source.time, f"{key}.time")], "t"
    unit, format = source.time_unit, source.time_format
    reading, _ = clean_copies.read_clean(
      self._con,
      file,
      "",
      lambda table: value_sql.time_reading(self._con, table, source.time, column, key, unit=unit, format=format),
      drop=True,
    )
    if value_sql.is_instant(type) or reading.sql == value_sql.iso_sql(column):
      return TimeKind("iso")
    if source.time_format:
      return TimeKind("format", format=source.time_format)
    return TimeKind("epoch", unit="s" if source.time_unit == "auto" else source.time_unit)

  def _items(self, table: str, fields: Mapping[str, str]) -> ItemValues:
    """Returns the values of the `fields` that events take from a table that `joined_tables.load_items` loaded."""
    columns, specs = field_sql.field_columns(self._data), field_specs(self._data)
    keys = [k for (k,) in self._con.execute(f"SELECT key FROM {table} ORDER BY file, row").fetchall()]
    values: dict[str, Sequence[object] | np.ndarray] = {}
    index = np.full((len(keys), len(fields)), -1, np.int32)
    for i, name in enumerate(fields):
      column, log1p = columns[name], specs[name].log1p
      value = f"sign({column}) * ln(1 + abs({column}))" if log1p else column
      rows = [v for (v,) in self._con.execute(f"SELECT {value} FROM {table} ORDER BY file, row").fetchall()]
      places: dict[object, int] = {}
      at = [-1 if v is None else places.setdefault(tuple(v) if isinstance(v, list) else v, len(places)) for v in rows]
      values[name], index[:, i] = list(places), at
      if specs[name].vector:
        values[name] = self._vectors(columns[name], list(places), specs[name].vector)
    return ItemValues({k: i for i, k in enumerate(keys)}, values, index)

  def _vectors(self, column: str, keys: Sequence[object], size: int) -> np.ndarray:
    """Returns the vectors with these keys: float32 `[keys, size]`."""
    if not keys:
      return np.zeros((0, size), np.float32)
    wanted = pa.table({"value": pa.array(keys, pa.string()), "place": np.arange(len(keys))})
    self._con.register("wanted", wanted)
    found = self._con.sql(
      f"SELECT vector FROM wanted JOIN {vector_sql.vectors_table(column)} USING (value) ORDER BY place"
    ).to_arrow_table()
    self._con.unregister("wanted")
    return found["vector"].combine_chunks().flatten().to_numpy().reshape(-1, size)


def _common(files: Sequence[TableFile], column: str) -> ColumnKind:
  kinds = []
  for file in files:
    if column in file.columns:
      from_json = column in file.derived and file.derived[column].path
      kinds.append(kind_of(file.columns[column], "jsonl" if from_json else file.format, file.text))
  return common_kind(kinds)
