"""Inspects files before they are prepared, for `supermoe inspect`: measures their columns and proposes a config.

Files with the same columns are one table. Its columns are measured over all rows, alone and together. `column_roles`
proposes the role of each column, and `config_file` writes the config.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Mapping, Sequence

import duckdb

from supermoe_jax.config import TextFormat
from supermoe_jax.config.tables import PLAIN_TEXT
from supermoe_jax.data.inspect import column_roles, config_file, leaks, list_columns, table_text, text_dialect
from supermoe_jax.data.inspect.column_roles import ColumnRole, ColumnStatistics
from supermoe_jax.data.inspect.leaks import LeakSuspect
from supermoe_jax.data.reading import derived_columns, paths, readers, sequence_files, value_sql
from supermoe_jax.data.reading.readers import EmptyFileError, TableFile, literal
from supermoe_jax.data.reading.remote import FilePath
from supermoe_jax.data.reading.text_files import clean_copies
from supermoe_jax.errors import DataError

MEMORY = "2GB"  # DuckDB's budget; distinct counts beyond it spill to disk
SAMPLE_ROWS = 1000
CODE = r"[A-Za-z]{1,4}[-_]?\d{3,}|\d{3,}[A-Z]|0\d+"  # see `ColumnStatistics.codes`
CANDIDATES = 3  # the most columns that are shown as a possible user


@dataclasses.dataclass(frozen=True)
class UserRows:
  """Rows per value of a column that may be the user.

  Attributes:
    column: the column.
    users: the number of its values.
    median: the median number of rows.
    many: the number of rows that nine values in ten do not exceed.
    most: the largest number of rows.
  """

  column: str
  users: int
  median: float
  many: float
  most: int


@dataclasses.dataclass(frozen=True)
class EventTableStatistics:
  """Statistics of a table that has a user and a time.

  Attributes:
    first: the first time, microseconds since 1970 UTC.
    last: the last time.
    quantiles: the times at `config_file.QUANTILES` of the rows, approximately.
    unreadable: rows without user or time, or whose time cannot be read.
    tie_rate: the share of rows that share user and time with another row.
    duplicate_rate: the share of rows that repeat another row in every column.
  """

  first: int
  last: int
  quantiles: tuple[int, ...]
  unreadable: int
  tie_rate: float
  duplicate_rate: float


@dataclasses.dataclass(frozen=True)
class InspectedTable:
  """A table of files with the same columns.

  Attributes:
    text: how the text of the files is written.
    bad_lines: the number of lines that cannot be read.
    columns: the statistics of each column.
    roles: the proposed role of each column.
    users: the columns that may be the user, likeliest first.
    events: statistics of the rows as events; None if no user or no time was found.
  """

  name: str
  files: tuple[FilePath, ...]
  format: str
  rows: int
  columns: tuple[ColumnStatistics, ...]
  roles: tuple[ColumnRole, ...]
  users: tuple[UserRows, ...]
  events: EventTableStatistics | None
  text: TextFormat = PLAIN_TEXT
  bad_lines: int = 0

  def having(self, *kinds: str) -> list[tuple[ColumnStatistics, ColumnRole]]:
    """Returns the columns whose role is of these kinds."""
    return [(c, r) for c, r in zip(self.columns, self.roles, strict=True) if r.kind in kinds]

  @property
  def keys(self) -> list[str]:
    """Returns the columns whose values are different in every row."""
    return [c.name for c in self.columns if c.distinct == c.rows]


@dataclasses.dataclass(frozen=True, repr=False)
class Inspection:
  """The result of an inspection.

  Attributes:
    tables: the tables, in the order of their first file.
    empty_files: files without a row.
    suspects: columns of events that nearly determine a label.
    config: the text of a complete config file; empty if no table has a user, a time and a field.
  """

  tables: tuple[InspectedTable, ...]
  empty_files: tuple[FilePath, ...]
  suspects: tuple[LeakSuspect, ...]
  config: str

  def __repr__(self) -> str:
    return self.render()

  def render(self) -> str:
    """Returns the findings as aligned text for a terminal, followed by the proposed config file."""
    parts = [table_text.table_text(table) for table in self.tables]
    if self.empty_files:
      parts.append("Files without a row: " + ", ".join(str(f) for f in self.empty_files))
    if self.suspects:
      parts.append("Suspicious columns:\n" + "\n".join(f"  {suspect}" for suspect in self.suspects))
    if self.config:
      rule = "─" * 100
      parts.append(f"Proposed config. Read it through, save it, and give it to --config.\n{rule}\n{self.config}{rule}")
    else:
      parts.append("No config is proposed: no table has a user, a time and a field.")
    return "\n\n".join(parts) + "\n"


def inspect(files: Sequence[str], format: str = "auto", text: TextFormat = PLAIN_TEXT) -> Inspection:
  """Measures files (paths or globs), and proposes the roles of their columns and a config.

  `text` holds what is known of how text files are written; the rest is guessed. Lines that cannot be read are left out
  and counted.

  Raises:
    DataError: a file is missing or cannot be read, or none of them holds a row.
  """
  with tempfile.TemporaryDirectory() as spill:
    con = readers.connect(memory=MEMORY, spill=pathlib.Path(spill))
    copies = contextlib.ExitStack()
    try:
      opened, empty = _group(con, files, format, text)
      names = _names([[file.path for file in group] for group in opened])
      groups: list[list[TableFile]] = []
      bad_lines = []
      for group in opened:
        good = [copies.enter_context(clean_copies.readable(con, file, drop=True)) for file in group]
        groups.append(text_dialect.with_guessed_dialect(con, [file for file, _ in good]))
        bad_lines.append(sum(bad for _, bad in good))
      tables = tuple(
        _inspect_table(con, name, group, bad) for name, group, bad in zip(names, groups, bad_lines, strict=True)
      )
      suspects = _suspects(con, tables, {name: _rows(group) for name, group in zip(names, groups, strict=True)})
    finally:
      copies.close()
      con.close()
  return Inspection(tables, tuple(empty), tuple(suspects), config_file.propose(tables))


def _group(
  con: duckdb.DuckDBPyConnection, files: Sequence[str], format: str, text: TextFormat
) -> tuple[list[list[TableFile]], list[FilePath]]:
  """Opens the files; returns them grouped by their columns, and the empty files."""
  groups: dict[tuple[str, ...], list[TableFile]] = {}
  empty: list[FilePath] = []
  found = paths.find_files(con, files, "")
  for file in found:
    try:
      table = derived_columns.with_members(con, text_dialect.open_guessed(con, file.path, format, text))
    except EmptyFileError:
      empty.append(file.path)
      continue
    groups.setdefault((table.format, *sorted(table.columns)), []).append(table)
  if not groups:
    raise DataError(f"none of the {len(found)} files holds a row; the first is {found[0].path}.")
  for group in groups.values():
    sequence_files.check_sequences(con, group)
  return list(groups.values()), empty


def _names(groups: Sequence[Sequence[FilePath]]) -> list[str]:
  """Names tables after their files, or after the folder if the file's name is generic, as `part-0.parquet`."""
  names: list[str] = []
  for files in groups:
    stem = files[0].name.partition(".")[0]
    if len(files) > 1:
      stem = re.sub(r"[\d\W_]+$", "", stem)
    if stem.lower() in ("", "part", "data", "file") or re.match(r"part-\d", stem):
      stem = (files[0].absolute() if isinstance(files[0], pathlib.Path) else files[0]).parent.name.partition(".")[0]
    name = re.sub(r"\W+", "_", stem).strip("_").lower() or "events"
    name = name if name.isidentifier() else f"events_{name}"
    if name in names:
      name += files[0].suffix.replace(".", "_")
    names.append(name if name not in names else f"{name}_{len(names) + 1}")
  return names


# ------------------------------------------------------------------------------------------------------------ measuring


def _inspect_table(
  con: duckdb.DuckDBPyConnection, name: str, files: Sequence[TableFile], bad_lines: int
) -> InspectedTable:
  aliases = {f"c{i}": column for i, column in enumerate(files[0].columns)}
  with readers.naming(files[0].path if len(files) == 1 else files[0].path.parent, files[0].format):
    con.execute(f"CREATE OR REPLACE TEMP VIEW found AS {_rows(files)}")
    columns = _measure(con, aliases, files[0].text)
    time = column_roles.sequence_time(columns) if files[0].format == "sequences" else column_roles.choose_time(columns)
    candidates = column_roles.user_candidates(columns, time[0] if time else None)
    users = [_rows_per_user(con, columns, place) for place in candidates[:CANDIDATES]]
    user = candidates[0] if candidates else None
    found = _column_roles(con, columns, time, user)
    json = files[0].format in readers.JSON_FORMATS
    for i, column in enumerate(columns):
      listed = (readers.LIST_SEPARATOR,) if column.name in files[0].lists else ()
      if vector := list_columns.vector_role(con, i, column, *listed):
        found[i] = vector
        continue
      # Outside JSON formats, text that looks like a JSON array is not read as a list.
      if column.holds_lists and column.distinct > 1 and (json or column.type != "VARCHAR"):
        lengths = list_columns.lengths(con, i, column.type, json=json)
        found[i] = list_columns.list_role(lengths) if lengths else found[i]
      elif column_roles.may_be_lists(found[i]) and (
        separator := readers.LIST_SEPARATOR if column.name in files[0].lists else list_columns.separator(con, i, column)
      ):
        lengths = list_columns.lengths(con, i, column.type, separator, json=json)
        found[i] = list_columns.list_role(lengths, separator)
    events = _event_facts(con, columns, time, user) if time and user is not None else None
  rows = columns[0].rows
  return InspectedTable(
    name,
    tuple(f.path for f in files),
    files[0].format,
    rows,
    tuple(columns),
    tuple(found),
    tuple(users),
    events,
    files[0].text,
    bad_lines,
  )


def _rows(files: Sequence[TableFile]) -> str:
  """Returns a query of the rows of a table's files, with columns c0, c1, … in the order of the first file."""
  aliases = {f"c{i}": column for i, column in enumerate(files[0].columns)}
  return " UNION ALL ".join(f"SELECT {', '.join(aliases)} FROM ({file.select(aliases)})" for file in files)


def _suspects(
  con: duckdb.DuckDBPyConnection, tables: Sequence[InspectedTable], rows: Mapping[str, str]
) -> list[LeakSuspect]:
  users = config_file.user_table_of(tables)
  found: list[LeakSuspect] = []
  for table in config_file.event_tables(tables):
    found += leaks.find_leaks(con, table, rows[table.name], users, rows[users.name] if users else "")
  return found


def _measure(con: duckdb.DuckDBPyConnection, aliases: dict[str, str], text: TextFormat) -> list[ColumnStatistics]:
  """Measures each column by itself, in one pass over the rows, and takes a sample of its values."""
  types = {alias: kind for alias, kind, *_ in con.execute("DESCRIBE found").fetchall()}
  texts = {alias: value_sql.text_sql(alias, types[alias]) for alias in aliases}
  ((rows, *facts),) = con.execute(
    "SELECT count(*), " + ", ".join(f"{{{_facts_sql(a, types[a], texts[a], text)}}}" for a in aliases) + " FROM found"
  ).fetchall()
  sample = con.execute(f"SELECT {', '.join(texts.values())} FROM found LIMIT {SAMPLE_ROWS}").fetchall()
  values = [tuple(dict.fromkeys(v for v in column if v is not None)) for column in zip(*sample, strict=True)]
  return [
    ColumnStatistics(name, types[alias], rows, sample=values[i], **{k: v for k, v in facts[i].items() if v is not None})
    for i, (alias, name) in enumerate(aliases.items())
  ]


def _facts_sql(column: str, type: str, text: str, format: TextFormat) -> str:
  """Returns the SQL of the members of a struct of attributes of `ColumnStatistics`."""
  facts = {"present": f"count({text})", "distinct": f"count(DISTINCT {text})", "length": f"avg(length({text}))"}
  if type == "VARCHAR":
    facts["iso_times"] = f"count({value_sql.iso_sql(column)})"
    facts["codes"] = f"count_if(regexp_full_match(trim({column}), {literal(CODE)}))"
  if type == "VARCHAR" or value_sql.is_number(type):
    number = value_sql.number_sql(column, type, format)
    number = f"CASE WHEN isfinite({number}) THEN {number} END"
    facts |= {"numbers": f"count({number})", "low": f"min({number})", "high": f"max({number})"}
    facts |= {"size": f"avg(abs({number}))", "whole": f"bool_and({number} = trunc({number}))"}
  return ", ".join(f"'{name}': {sql}" for name, sql in facts.items())


def _rows_per_user(con: duckdb.DuckDBPyConnection, columns: Sequence[ColumnStatistics], place: int) -> UserRows:
  text = value_sql.text_sql(f"c{place}", columns[place].type)
  ((users, median, many, most),) = con.execute(
    "SELECT count(*), median(n), quantile_disc(n, 0.9), max(n) FROM "
    f"(SELECT count(*) AS n FROM found WHERE {text} IS NOT NULL GROUP BY {text})"
  ).fetchall()
  return UserRows(columns[place].name, users, median, many, most)


def _column_roles(
  con: duckdb.DuckDBPyConnection,
  columns: Sequence[ColumnStatistics],
  time: tuple[int, ColumnRole] | None,
  user: int | None,
) -> list[ColumnRole]:
  """Returns the role of each column. A second pass over the rows finds columns whose values have one user each."""
  found = [column_roles.field_role(column, timed=time is not None) for column in columns]
  if time:
    found[time[0]] = time[1]
  if user is None:
    return found
  found[user] = ColumnRole(
    "user", "by its name" if columns[user].named(column_roles.USER_WORDS) is not None else "ids that repeat"
  )
  # Only a column with more values than users is checked: fewer values cannot identify all users.
  asked = [
    i for i, r in enumerate(found) if r.kind in ("vocabulary", "hash") and columns[i].distinct > columns[user].distinct
  ]
  if asked:
    owner = value_sql.text_sql(f"c{user}", columns[user].type)
    pairs = [f"count(DISTINCT ({value_sql.text_sql(f'c{i}', columns[i].type)}, {owner}))" for i in asked]
    where = [f"FILTER ({value_sql.text_sql(f'c{i}', columns[i].type)} IS NOT NULL)" for i in asked]
    (counts,) = con.execute(
      f"SELECT {', '.join(f'{p} {w}' for p, w in zip(pairs, where, strict=True))} FROM found"
    ).fetchall()
    for i, n in zip(asked, counts, strict=True):
      found[i] = column_roles.field_role(columns[i], one_user_each=n <= columns[i].distinct * (2 - column_roles.MOSTLY))
  return found


def _event_facts(
  con: duckdb.DuckDBPyConnection, columns: Sequence[ColumnStatistics], time: tuple[int, ColumnRole], user: int
) -> EventTableStatistics | None:
  """Returns statistics of a table as events; None if no row has both a user and a readable time."""
  owner = value_sql.text_sql(f"c{user}", columns[user].type)
  moment = column_roles.time_sql(f"c{time[0]}", columns[time[0]].type, time[1])
  events = f"(SELECT {owner} AS owner, {moment} AS moment FROM found WHERE owner IS NOT NULL AND moment IS NOT NULL)"
  ((n, first, last, quantiles),) = con.execute(
    f"SELECT count(*), min(moment), max(moment), approx_quantile(moment, {list(config_file.QUANTILES)}) FROM {events}"
  ).fetchall()
  if not n:
    return None
  ((tied,),) = con.execute(
    f"SELECT coalesce(sum(n), 0) FROM (SELECT count(*) AS n FROM {events} GROUP BY owner, moment) WHERE n > 1"
  ).fetchall()
  everything = ", ".join(f"c{i}" for i in range(len(columns)))
  ((different,),) = con.execute(f"SELECT count(DISTINCT hash({everything})) FROM found").fetchall()
  rows = columns[0].rows
  return EventTableStatistics(first, last, tuple(quantiles), rows - n, int(tied) / n, 1 - different / rows)
