"""Writes the config file that `supermoe inspect` proposes: complete and loadable, for a person to read and edit."""

from __future__ import annotations

import datetime
import glob
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from supermoe_jax.config import MICROSECONDS_PER_DAY, Model, Split, format_time
from supermoe_jax.data.inspect import column_roles, label_tables, proposed_aggregates, proposed_tasks, text_dialect
from supermoe_jax.data.reading import json_files, paths, readers
from supermoe_jax.data.reading.remote import FilePath
from supermoe_jax.errors import DataError

if TYPE_CHECKING:
  from supermoe_jax.data.inspect.column_roles import ColumnRole, ColumnStatistics
  from supermoe_jax.data.inspect.inspect import InspectedTable

QUANTILES = (0.7, 0.85)  # of the events' times: the end of the training period, and the test snapshot
LEAST_ROUNDED_UNITS = 20  # units (days, hours, …) that the log must span for snapshot times to be rounded to them
SNAPSHOTS = 4  # the least number of training snapshots
MOST_SCORED = 10_000  # values of the next event that every step scores; of more it scores a sample
EVENTS_STEP = 32  # `model.max_events` is a multiple

_Comments = dict[tuple[str, ...], str]  # path of keys → comment on the key's line


def event_tables(tables: Sequence[InspectedTable]) -> list[InspectedTable]:
  """Returns the tables that hold events."""
  return [t for t in tables if _is_source(t, tables)]


def user_table_of(tables: Sequence[InspectedTable]) -> InspectedTable | None:
  """Returns the user table: a table without events whose key is the user of a table with events."""
  sources = event_tables(tables)
  return _users(sources, [t for t in tables if t not in sources])


def propose(tables: Sequence[InspectedTable]) -> str:
  """Returns the text of a config file for the tables that hold events; empty if none has a field to predict.

  Another table becomes the item table if its key is a field of the events, and the user table if its key is the user.
  A table of dated labels becomes a task.
  """
  sources = event_tables(tables)
  others = [t for t in tables if t not in sources]
  items = {t.name: table for t in sources if (table := _items(t, others)) is not None}
  comments: _Comments = {}
  fields, target = _fields(sources, items, comments)
  if target is None:
    return ""
  name = "_".join(t.name for t in sources)
  data: dict[str, Any] = {
    "path": f"datasets/{name}",
    "sources": {t.name: _source(t, items.get(t.name)) for t in sources},
    "fields": fields,
  }
  for table in sources:
    comments["data", "sources", table.name, "null_values"] = "read as no value; leave out what is a value"
  users = user_table_of(tables)
  if users is not None:
    data["users"] = {"files": _patterns(users.files), "user": users.having("user")[0][0].name, **_written(users)}
  data["split"] = _split(sources, comments)
  if any(t.format == "sequences" for t in sources):
    data["aggregates"] = {"enabled": False}  # aggregates need times, for their windows
  if (bad := sum(_bad_rows(t) for t in [*sources, *items.values()]) + (users.bad_lines if users else 0)) > 0:
    data["on_bad_rows"] = "drop"
    lines = sum(t.bad_lines for t in [*sources, *items.values(), *([users] if users else [])])
    comments["data", "on_bad_rows"] = (
      f"up to {bad:,} rows have no user, no time or a number that cannot be read"
      + f", or are {lines:,} bad lines" * bool(lines)
    )
  tasks: dict[str, Any] = {f"next_{target}": {"kind": "next_event", "field": target}}
  if _distinct(sources, items, fields, target) > MOST_SCORED:
    tasks[f"next_{target}"]["softmax"] = "sampled"
    comments["tasks", f"next_{target}", "softmax"] = "scores a sample of the many values in training"
  for task, (settings, comment) in proposed_tasks.future_tasks(sources, items, data).items():
    tasks.setdefault(task, settings)
    comments["tasks", task] = comment
  for table in others if data["split"].get("mode") != "leave_one_out" else []:
    if (label := label_tables.dated_label(table, tables)) is not None:
      task = _identifier(label.name if _identifier(label.name) not in tasks else f"{table.name}_{label.name}")
      tasks[task] = label_tables.dated_task(table, label, _patterns(table.files))
      comments["tasks", task] = f"{table.name}: labels with times, not events; {label.distinct:,} values"
  proposed = proposed_aggregates.propose_aggregates(sources, items, fields, tasks)
  if proposed and "aggregates" not in data:
    data["aggregates"] = {key: value for key, (value, _) in proposed.items()}
    comments.update({("data", "aggregates", key): comment for key, (_, comment) in proposed.items() if comment})
  raw: dict[str, Any] = {"data": data, "tasks": tasks}
  if (events := _shown_events(sources)) < Model.max_events:
    raw["model"] = {"max_events": events}
    comments["model", "max_events"] = "holds the whole history of nine users in ten"
  raw["train"] = {"steps": "auto"}
  comments["train", "steps"] = "training stops when validation gains nothing"
  docstring = f'"""Events of {", ".join(t.name for t in sources)}, as proposed by `supermoe inspect`."""'
  body = "\n".join(_config_lines(raw, comments, (), "  "))
  return (
    f"{docstring}\n\nimport ml_collections\n\n\ndef get_config() -> ml_collections.ConfigDict:\n"
    f"  return ml_collections.ConfigDict({body})\n"
  )


def _distinct(
  sources: Sequence[InspectedTable], items: Mapping[str, InspectedTable], fields: Mapping[str, Any], name: str
) -> int:
  """Returns the number of values of a field."""
  joined = [(t, c) for t in sources for table in (t, items.get(t.name)) if table for c in table.columns]
  reading = (c.distinct for t, c in joined if proposed_tasks.field_of_column(fields, t.name, c.name) == name)
  return max(reading, default=0)


def _shown_events(sources: Sequence[InspectedTable]) -> int:
  """Returns a multiple of `EVENTS_STEP` events that holds the history of nine users in ten."""
  many = sum(t.users[0].many for t in sources)
  return max(-(-int(many) // EVENTS_STEP), 1) * EVENTS_STEP


def _is_source(table: InspectedTable, tables: Sequence[InspectedTable]) -> bool:
  """Returns whether a table holds events. A table with one row a user, such as sign-ups, is rather a user table.

  A table of dated labels holds no events either.
  """
  if table.events is None or label_tables.dated_label(table, tables) is not None:
    return False
  return table.users[0].most > 1 or not any(t.users and t.users[0].most > 1 and t.events for t in tables)


def _items(source: InspectedTable, others: Sequence[InspectedTable]) -> InspectedTable | None:
  """Returns the first table of a single file whose key is a field of the source."""
  return next((t for t in others if len(t.files) == 1 and _key(source, t) is not None), None)


def _key(source: InspectedTable, items: InspectedTable) -> str | None:
  """Returns the source's field that is the key of an item table, by the name of the key.

  A JSON object keyed by id does not name its keys: then it is the field that most likely names the item.
  """
  fields = [(c, r) for c, r in source.having("vocabulary", "hash") if "many" not in r.settings]
  if items.format == "json_object":
    named = [column for column, _ in fields if column.named(column_roles.ITEM_WORDS) is not None]
    return min(named, key=column_roles.next_event_rank).name if named else None
  return next((column.name for column, _ in fields if column.name in items.keys), None)


def _users(sources: Sequence[InspectedTable], others: Sequence[InspectedTable]) -> InspectedTable | None:
  owners = [t.having("user")[0][0].name for t in sources]
  return next((t for t in others if t.having("user") and t.having("user")[0][0].name in {*owners} & {*t.keys}), None)


def _bad_rows(table: InspectedTable) -> int:
  """Returns an upper bound of the number of rows that the reader would reject."""
  unreadable = table.events.unreadable if table.events else 0
  return unreadable + table.bad_lines + sum(c.present - c.numbers for c, _ in table.having("numeric"))


def _source(table: InspectedTable, items: InspectedTable | None) -> dict[str, Any]:
  ((user, _),), ((time, role),) = table.having("user"), table.having("time")
  source: dict[str, Any] = {"files": _patterns(table.files), "user": user.name, "time": time.name, **role.settings}
  source |= _written(table)
  if items is not None:
    source["items"] = {"file": str(items.files[0]), "key": _key(table, items), **_written(items)}
  return source


def _written(table: InspectedTable) -> dict[str, Any]:
  """Returns the settings of a table's format and text that do not follow from its files."""
  known = {table.format, "jsonl"} if table.format == "json_object" else {table.format}
  format = {} if {_format_by_ending(file) for file in table.files} <= known else {"format": table.format}
  return {**format, **text_dialect.text_settings(table.text)}


def _format_by_ending(file: FilePath) -> str:
  try:
    return readers.format_of(file)
  except DataError:
    return ""


def _patterns(files: Sequence[FilePath]) -> list[str]:
  """Returns the files, or one glob that matches exactly them: a shell may have expanded the glob that was typed."""
  first = files[0]
  local = [file for file in files if isinstance(file, pathlib.Path)]
  if len(local) == len(files) > 1 and isinstance(first, pathlib.Path) and len({f.is_absolute() for f in local}) == 1:
    folder = os.path.commonpath([str(file.parent) for file in local]) or "."
    between = "" if first.parent == pathlib.Path(folder) else "**/"
    pattern = f"{glob.escape(folder)}/{between}*{''.join(first.suffixes)}"
    if set(paths.glob_files(pattern)) == set(files):
      return [pattern]
  return [str(file) for file in files]


def _fields(
  sources: Sequence[InspectedTable], items: Mapping[str, InspectedTable], comments: _Comments
) -> tuple[dict[str, dict[str, Any]], str | None]:
  """Returns the fields of all sources, and the one to predict; a column that sources share is one field."""
  fields: dict[str, dict[str, Any]] = {}
  carriers: dict[str, list[str]] = {}
  ranks: dict[str, tuple[int, int]] = {}
  for table in sources:
    own = table.having("vocabulary", "hash", "numeric", "vector")
    taken = {column.name for column in table.columns}
    joined = items[table.name].having("vocabulary", "hash", "numeric", "vector") if table.name in items else []
    if table.name in items and items[table.name].format == "json_object":
      taken.add(json_files.KEY)
    for column, role in [*own, *((c, r) for c, r in joined if c.name not in taken)]:
      name = _identifier(column.name)
      settings = _field(column, role, name)
      if name in fields and fields[name] != settings:
        name = f"{table.name}_{name}"
        settings["column"] = column.name
      fields[name] = settings
      carriers.setdefault(name, []).append(table.name)
      comments["data", "fields", name] = _comment(column, role)
      if role.kind not in ("numeric", "vector") and "many" not in role.settings:
        ranks[name] = min(column_roles.next_event_rank(column), ranks.get(name, (len(column_roles.ITEM_WORDS), 0)))
  for name, carrying in carriers.items():
    if len(carrying) < len(sources):
      fields[name]["sources"] = carrying
  if not ranks:
    return fields, None
  target = min(ranks, key=lambda n: ("kind" in fields[n], ranks[n]))
  if fields[target].get("kind") == "hash":
    del fields[target]["kind"], fields[target]["size"]  # only a vocabulary can be predicted: keep its frequent values
  return fields, target


def _field(column: ColumnStatistics, role: ColumnRole, name: str) -> dict[str, Any]:
  field: dict[str, Any] = {} if role.kind == "vocabulary" else {"kind": role.kind}
  if name != column.name:
    field["column"] = column.name
  return {**field, **role.settings}


def _comment(column: ColumnStatistics, role: ColumnRole) -> str:
  if role.kind == "numeric":
    return f"{column.low:g} to {column.high:g}"
  if role.kind == "vector":
    return f"{column.distinct:,} different vectors"
  return f"{column.distinct:,} different lists; {role.note}" if role.note else f"{column.distinct:,} values"


def _identifier(name: str) -> str:
  name = re.sub(r"\W", "_", name)
  return name if name.isidentifier() else f"_{name}"


def _split(sources: Sequence[InspectedTable], comments: _Comments) -> dict[str, Any]:
  """Returns a temporal split at quantiles of the largest table's events; leave one out if its times are too few."""
  if any(t.format == "sequences" for t in sources):
    comments["data", "split"] = "a place in a sequence is no time"
    return {"mode": "leave_one_out"}
  facts = [t.events for t in sources if t.events]
  first, last = min(f.first for f in facts), max(f.last for f in facts)
  largest = max(sources, key=lambda t: t.rows).events
  assert largest is not None
  train_end, test = (_rounded_down(time, last - first) for time in largest.quantiles)
  if not first < train_end < test <= last:
    comments["data", "split"] = (
      f"too few times between {format_time(first)} and {format_time(last)} for a temporal split"
    )
    return {"mode": "leave_one_out"}
  comments["data", "split", "train_end"] = f"the log runs from {format_time(first)} to {format_time(last)}"
  split: dict[str, Any] = {"train_end": _iso(train_end), "validation": [_iso(train_end)], "test": [_iso(test)]}
  days = (train_end - first) / MICROSECONDS_PER_DAY
  if days < SNAPSHOTS * Split.every_days:
    split["every_days"] = float(f"{days / SNAPSHOTS:.3g}")
  return split


def _rounded_down(time: int, span: int) -> int:
  """Rounds down to a day, hour, minute or second: the coarsest unit that fits the log's span often enough."""
  seconds = next((s for s in (86_400, 3_600, 60) if span >= LEAST_ROUNDED_UNITS * s * 1_000_000), 1)
  return time - time % (seconds * 1_000_000)


def _iso(microseconds: int) -> str:
  moment = datetime.datetime(1970, 1, 1) + datetime.timedelta(microseconds=microseconds)
  return moment.date().isoformat() if moment.time() == datetime.time() else moment.isoformat()


def _config_lines(value: Any, comments: Mapping[tuple[str, ...], str], path: tuple[str, ...], indent: str) -> list[str]:
  """Returns the lines of nested mappings, one key a line; a field's settings share a line. Comments end their line."""
  if not isinstance(value, Mapping):
    # The JSON of texts, numbers and lists of them is valid Python.
    return [repr(value) if isinstance(value, bool) else json.dumps(value, ensure_ascii=False)]
  if (path[:2] == ("data", "fields") and len(path) == 3) or not value:
    return [
      "{" + ", ".join(f'"{k}": {_config_lines(v, comments, (*path, k), indent)[0]}' for k, v in value.items()) + "}"
    ]
  out = ["{"]
  for key, inner in value.items():
    where = (*path, key)
    lines = _config_lines(inner, comments, where, indent + "  ")
    comment = f"  # {comments[where]}" if where in comments else ""
    out.append(f'{indent}  "{key}": {lines[0]}')
    out += lines[1:]
    out[-1] += ","
    out[-1 if len(lines) == 1 else -len(lines)] += comment
  return [*out, f"{indent}}}"]
