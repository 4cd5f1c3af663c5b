"""Renders the findings of an inspection on a table as aligned text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from supermoe_jax.config import format_time
from supermoe_jax.data.inspect import text_dialect

if TYPE_CHECKING:
  from supermoe_jax.data.inspect.column_roles import ColumnStatistics
  from supermoe_jax.data.inspect.inspect import InspectedTable

EXAMPLES, EXAMPLES_WIDTH = 3, 40


def table_text(table: InspectedTable) -> str:
  """Returns the findings on a table as aligned lines."""
  files = f"{len(table.files)} files, {table.files[0]} …" if len(table.files) > 1 else str(table.files[0])
  lines = [f"{table.name}: {table.rows:,} rows ({files})", ""]
  rows = [("column", "type", "null", "distinct", "examples", "role")]
  for column, role in zip(table.columns, table.roles, strict=True):
    encoding = "".join(f" {value}" for key, value in role.settings.items() if key == "encoding")
    null = f"{1 - column.present / column.rows:.1%}"
    kind = column.type if table.format == "parquet" else "text"
    rows.append(
      (column.name, kind, null, f"{column.distinct:,}", _examples(column), f"{role.kind}{encoding}: {role.reason}")
    )
  lines += _aligned(rows, right={2, 3})
  if written := text_dialect.text_settings(table.text):
    lines += ["", "  written   " + ", ".join(f"{name}={value!r}" for name, value in written.items())]
  if table.bad_lines:
    lines += ["", f"  bad lines {table.bad_lines:,} lines cannot be read and are left out"]
  if table.format == "sequences" and table.events:
    lines += ["", f"  time      none, only an order: positions up to {table.events.last // 1_000_000 + 1:,}"]
  elif table.events:
    days = (table.events.last - table.events.first) / 86_400e6
    lines += [
      "",
      f"  time      {format_time(table.events.first)} to {format_time(table.events.last)} UTC, {days:,.1f} days",
    ]
  else:
    keys = f"; {table.keys[0]} is different in every row" if table.keys else ""
    lines += ["", f"  no events: no column is the {'time' if table.users else 'user'}{keys}"]
  for place, user in enumerate(table.users):
    rows_each = f"{user.users:,} users, rows of each: median {user.median:,.0f}, most {user.most:,}"
    lines.append(f"  {'or user' if place else 'user':8}  {user.column}: {rows_each}")
  if table.events:
    lines.append(f"  ties      {table.events.tie_rate:.1%} of the rows share user and time with another row")
    lines.append(f"  repeats   {table.events.duplicate_rate:.1%} of the rows repeat another row in every column")
    if table.events.unreadable:
      lines.append(f"  bad rows  {table.events.unreadable:,} rows lack a user or a time that can be read")
  return "\n".join(lines)


def _examples(column: ColumnStatistics) -> str:
  text = ", ".join(" ".join(value.split()) for value in column.sample[:EXAMPLES])
  return text if len(text) <= EXAMPLES_WIDTH else text[: EXAMPLES_WIDTH - 1] + "…"


def _aligned(rows: Sequence[Sequence[str]], right: set[int]) -> list[str]:
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return [
    "  "
    + "  ".join(
      c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
