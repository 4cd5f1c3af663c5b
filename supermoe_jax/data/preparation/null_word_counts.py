"""Counts words such as "NULL" that a log holds as users and categories, and warns of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from supermoe_jax import config
from supermoe_jax.data.encoding.vectors import Vectors
from supermoe_jax.data.encoding.vocabulary import Encoders, Vocabulary
from supermoe_jax.data.preparation.log_database import LogDatabase
from supermoe_jax.data.reading.readers import literal
from supermoe_jax.data.reading.text_files.null_words import NULL_WORDS, null_word_warning

Counts = dict[str, dict[str, int]]
USER = "user"  # the key of the users' words; fields have the key "field NAME"


def count_null_words(log: LogDatabase, encoders: Encoders) -> Counts:
  """Returns what holds words for "no value" → word → the number of events; only of tables without `null_values`.

  A vocabulary field is searched in its vocabulary, so a log without such words costs next to nothing.
  """
  words = ", ".join(map(literal, sorted(NULL_WORDS)))
  found: Counts = {}
  if _source_keys(log.data, log.data.sources, items=False):
    users = log.query(f'SELECT "user" FROM ordered_users WHERE "user" IN ({words}) ORDER BY "user"')
    found[USER] = {user: log.count_events(user) for (user,) in users}
  for name, encoder in encoders.categorical.items():
    if not _field_keys(log.data, name) or isinstance(encoder, Vectors):
      continue
    if isinstance(encoder, Vocabulary) and NULL_WORDS.isdisjoint(encoder.values):
      continue
    values = f"SELECT value, sum(n)::BIGINT FROM ({log.values_sql(name)}) WHERE value IN ({words}) GROUP BY value"
    found[f"field {name}"] = dict(log.query(f"{values} ORDER BY value"))
  return {what: counts for what, counts in found.items() if counts}


def null_word_warnings(cfg: config.Config, found: Mapping[str, Any], user_table: Mapping[str, Any]) -> list[str]:
  """Returns a warning for each word that `count_null_words` found, and for each such class of a user label."""
  rows: list[tuple[str, str, int, str]] = []  # what, word, count, place of the setting
  for what, counts in found.items():
    name = what.removeprefix("field ")
    keys = _source_keys(cfg.data, cfg.data.sources, items=False) if what == USER else _field_keys(cfg.data, name)
    rows += [(what, word, n, " or ".join(keys[:2])) for word, n in counts.items()]
  users = cfg.data.users
  for task, counts in user_table.get("user_labels", {}).items() if users and not users.null_values else ():
    classes = {word: n for word, n in counts.get("classes", {}).items() if word in NULL_WORDS}
    rows += [(f"task {task}", word, n, "config.data.users") for word, n in classes.items()]
  words = {key: [word for _, word, _, other in rows if other == key] for *_, key in rows}
  return [null_word_warning(*row, words[row[-1]]) for row in rows]


def _field_keys(data: config.Data, name: str) -> list[str]:
  """Returns the places of the tables that a field is read from and that set no `null_values`."""
  field = data.fields[name]
  if field.table == "users":
    return [] if data.users is None or data.users.null_values else ["config.data.users"]
  return _source_keys(data, field.sources or data.sources, items=True)


def _source_keys(data: config.Data, names: Iterable[str], *, items: bool) -> list[str]:
  keys = []
  for name in names:
    source = data.sources[name]
    keys += [] if source.null_values else [f"config.data.sources.{name}"]
    if items and source.items and not source.items.null_values:
      keys.append(f"config.data.sources.{name}.items")
  return keys
