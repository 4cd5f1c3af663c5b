"""Knows the words that writers of text tables use for "no value"; read as values, they become users and classes."""

from __future__ import annotations

from collections.abc import Iterable

from supermoe_jax.config.text_settings import setting_text

NULL_WORDS = frozenset(
  ("NULL", "Null", "null", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "None", "none", "\\N", "NIL", "nil")
)


def null_word_warning(what: str, word: str, count: int, key: str, words: Iterable[str]) -> str:
  """Returns the warning that a word for "no value" is read as a value.

  Args:
    what: the column or field.
    word: the word.
    count: the number of its rows.
    key: the place of the table's settings, as `setting_text` takes it.
    words: all such words of the table, for the setting.
  """
  rows = f"{count:,} row{'s' if count > 1 else ''}"
  setting = setting_text(key, "null_values", tuple(sorted({*words})))
  return f"{what} holds {word!r} in {rows}, as a value; if it means no value, set {setting}"
