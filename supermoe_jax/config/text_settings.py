"""Checks the settings of text tables, and writes them in messages as a user writes them."""

from __future__ import annotations

import shlex
from typing import Any

from supermoe_jax.config.tables import TextFormat
from supermoe_jax.errors import ConfigError


def setting_text(key: str, name: str, value: Any) -> str:
  """Returns a setting of `TextFormat` as a user writes it, for a message.

  Args:
    key: the table's place in the config; empty for a table that an option of the command names.
    name: the setting.
    value: its value; `...` stands for a value that the user knows.
  """
  if key:
    shown = "(…)" if value is ... else repr(value)
    return f"{key}.{name}={shown}"
  if name == "header":
    return "--header" if value else "--no-header"
  values = "…" if value is ... else shlex.join(value if isinstance(value, tuple) else (value,))
  return f"--{name.replace('_', '-')} {values}"


def check_text_format(key: str, text: TextFormat) -> None:
  """Raises ConfigError for settings that can never work; `key` as in `setting_text`."""

  def require(holds: bool, name: str, why: str) -> None:
    if not holds:
      raise ConfigError(f"{setting_text(key, name, getattr(text, name))} {why}")

  separators = '"\r\n'
  require(
    len(text.delimiter.encode()) <= 4 and not set(text.delimiter) & set(separators),
    "delimiter",
    "must be at most four bytes, without quotation marks and line ends.",
  )
  require(
    text.header is not False or bool(text.columns),
    "header",
    f"needs the names of all columns: set {setting_text(key, 'columns', ...)}.",
  )
  require(all(text.columns), "columns", "holds an empty name; name every column.")
  for name in text.columns:
    require(text.columns.count(name) == 1, "columns", f"names the column {name!r} twice; rename one of them.")
  require(
    len(text.thousands) <= 1 and not text.thousands.isdigit() and text.thousands not in ("+", "-"),
    "thousands",
    "must be one character that is no digit and no sign, such as '.' or ' '.",
  )
  require(
    text.thousands != text.decimal, "thousands", f"equals {setting_text(key, 'decimal', text.decimal)}; set another."
  )
