"""Checks the lines of sequence files, which hold one user a line, before any event is read."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from supermoe_jax.data.reading import readers
from supermoe_jax.data.reading.readers import TableFile
from supermoe_jax.errors import DataError


def check_sequences(con: duckdb.DuckDBPyConnection, files: Sequence[TableFile]) -> None:
  """Checks the lines of a source's sequence files; ignores files of other formats.

  Raises:
    DataError: a line is empty or has no item, or a user stands in two lines; the message names file and line.
  """
  files = [file for file in files if file.format == "sequences"]
  for file in files:
    with readers.naming(file.path, file.format):
      bad = con.execute(
        f'SELECT "user", min(line), count(*) FROM ({readers.lines_sql(file.path)}) '
        'WHERE "user" IS NULL OR len(items) = 0 GROUP BY ALL ORDER BY 2'
      ).fetchall()
    if bad:
      user, line, _ = bad[0]
      what = "is empty" if user is None else f"holds the user {user!r} and no item"
      lines = sum(n for *_, n in bad)
      raise DataError(
        f"{file.path}: line {line} {what} ({lines} line{'s' if lines > 1 else ''} without an item); a line is a user "
        "and its items, oldest first. Remove such lines."
      )
  _check_users(con, files)


def _check_users(con: duckdb.DuckDBPyConnection, files: Sequence[TableFile]) -> None:
  """Raises DataError if a user stands in two lines, since the order of the two is unknown."""
  if not files:
    return
  lines = " UNION ALL ".join(
    f'SELECT {i} AS file, line, "user" FROM ({readers.lines_sql(file.path)})' for i, file in enumerate(files)
  )
  twice = con.execute(
    f'SELECT "user", list((file, line) ORDER BY file, line)[:2] AS places, count(*) AS n FROM ({lines}) '
    'GROUP BY "user" HAVING n > 1 ORDER BY places LIMIT 1'
  ).fetchall()
  for user, places, n in twice:
    where = " and ".join(f"{files[file].path} line {line}" for file, line in places)
    raise DataError(f"{where}: the user {user!r} has {n} lines; join them, oldest item first.")
