"""Carries columns of the user table along with embeddings.

DuckDB reads the columns once and sorts them into the order of the dataset's users; it may spill to disk. The sorted
file lies in the directory of the parts until all are written. Each part reads the rows of its own users.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Sequence

import duckdb
import pyarrow as pa

from supermoe_jax import config
from supermoe_jax.data.dataset import dataset as dataset_lib
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.reading import field_sql, paths, readers, value_sql
from supermoe_jax.data.reading.field_sql import DROP_REMEDY
from supermoe_jax.data.reading.text_files import clean_copies
from supermoe_jax.embeddings import part_files
from supermoe_jax.errors import ConfigError, DataError

FILE, SPILL = "columns.parquet", "columns.spilled"


def check_columns(cfg: config.Config, columns: Sequence[str]) -> None:
  """Raises ConfigError if there is no user table, or a column is named twice or like an embedding column."""
  if not columns:
    return
  if cfg.data.users is None:
    raise ConfigError(
      f"--columns {' '.join(columns)}: the run's config names no table of users (config.data.users) to take them from."
    )
  for name in columns:
    if name in part_files.COLUMNS or columns.count(name) > 1:
      why = "is a column of every embedding table" if name in part_files.COLUMNS else "is named twice"
      raise ConfigError(f"--columns: {name!r} {why}; leave it out.")


def sort_columns(cfg: config.Config, dataset: Dataset, columns: Sequence[str], work: pathlib.Path, rows: int) -> None:
  """Writes the columns of the dataset's users, in its order, `rows` a row group; users without a row get nulls.

  Raises:
    DataError: a file or a column is missing, a user has two rows, or the table holds none of the dataset's users.
  """
  users = cfg.data.users
  assert users is not None
  con = readers.connect(memory=cfg.data.memory, spill=work / SPILL)
  drop, copies = cfg.data.on_bad_rows == "drop", contextlib.ExitStack()
  try:
    key = "config.data.users"
    tables = paths.open_files(con, users.files, users.format, {users.user, *columns}, key, users).tables
    parts = []
    for table, _ in (copies.enter_context(clean_copies.readable(con, t, DROP_REMEDY, drop=drop)) for t in tables):
      wanted = {"user": table.require(users.user, f"{key}.user")}
      wanted |= {f"c{i}": table.require(name, "--columns") for i, name in enumerate(columns)}
      field_sql.check_ids(con, table, users.user, f"{key}.user")
      user = value_sql.text_sql('e."user"', table.columns[wanted["user"]])
      values = ", ".join(f"e.c{i} AS {readers.identifier(name)}" for i, name in enumerate(columns))
      parts.append(f'SELECT {user} AS "user", {values} FROM ({table.select(wanted)}) e')
    con.execute(f"CREATE TEMP VIEW known AS {' UNION ALL BY NAME '.join(parts)}")
    twice = con.execute('SELECT "user" FROM known GROUP BY 1 HAVING count(*) > 1 ORDER BY 1 LIMIT 1').fetchone()
    if twice:
      raise DataError(f"{users.user}={twice[0]!r} has several rows in {key}; keep one row a user.")
    source = readers.literal(str(dataset.path / dataset_lib.USERS))
    places = f'SELECT "user", file_row_number AS place FROM read_parquet({source}, file_row_number = true)'
    if not con.execute(f'SELECT 1 FROM ({places}) SEMI JOIN known USING ("user") LIMIT 1').fetchall():
      pairs = (f'SELECT "user" FROM {table} LIMIT 3' for table in ("known", f"({places})"))
      shown = [", ".join(repr(user) for (user,) in con.execute(query).fetchall()) for query in pairs]
      raise DataError(
        f"--columns: {key} holds none of the dataset's users: its column {users.user!r} holds {shown[0]}; the dataset "
        f"holds {shown[1]}. Write the ids of both in the same way."
      )
    con.execute(
      f'COPY (SELECT known.* EXCLUDE ("user") FROM ({places}) LEFT JOIN known USING ("user") ORDER BY place) '
      f"TO {readers.literal(str(work / FILE))} (FORMAT parquet, ROW_GROUP_SIZE {rows})"
    )
  except duckdb.Error as error:
    raise DataError(f"reading --columns failed: {str(error).splitlines()[0]}") from error
  finally:
    copies.close()
    con.close()


def read_user_columns(work: pathlib.Path, start: int, stop: int) -> pa.Table:
  """Reads the columns of the users from `start` to before `stop`."""
  return dataset_lib.rows_between(work / FILE, None, start, stop)
