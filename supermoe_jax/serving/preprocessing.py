"""Turns a user's raw events as JSON into the encoder's features: preparation without the event files.

`json_values` reads the values, `encoding.vocabulary` and `encoding.numeric` encode them, `dataset.windows` and
`encoding.aggregates` lay them out. Training reads a dataset with the same code. The settings are stored in
`preprocessing.json`, each vocabulary's values in a JSON file, and each table of items in a JSON and a NumPy file.

Shapes: N events, F columns of codes, G numeric fields, A aggregates, L events of a row.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import pathlib
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from supermoe_jax.batch import ABSENT, FIRST_VALUE, UNKNOWN, Features
from supermoe_jax.data.dataset import windows
from supermoe_jax.data.encoding import factors
from supermoe_jax.data.encoding.aggregates import Aggregator
from supermoe_jax.data.encoding.histories import UserBlock, UserHistory
from supermoe_jax.data.encoding.numeric import NumberEncoder, number_encoder
from supermoe_jax.data.encoding.vectors import VectorScale, concatenated
from supermoe_jax.data.encoding.vocabulary import Categorical, Hashing, Vocabulary
from supermoe_jax.data.format.schema import bind_aggregate
from supermoe_jax.errors import nearest
from supermoe_jax.serving.json_values import ColumnKind, ValueProblem, number_reader, text_reader, texts_reader
from supermoe_jax.serving.json_vectors import vector_reader
from supermoe_jax.serving.spec import PreprocessingSpec, SourceSpec, spec_from_json

FILE = "preprocessing.json"

EVENTS, USER = "events", "user"  # the keys of a user's JSON


class InputError(ValueError):
  """Error of a user's JSON that cannot be read; the message names the place, the value and the remedy.

  Attributes:
    place: the keys and indices that lead to the value.
    problem: what is wrong there.
  """

  def __init__(self, place: Sequence[str | int], problem: str):
    self.place, self.problem = tuple(place), problem
    super().__init__(f"{'.'.join(map(str, place))}: {problem}" if place else problem)


@dataclasses.dataclass(frozen=True)
class ItemValues:
  """A table of items: the distinct values of each joined field, and which of them each item has.

  Attributes:
    rows: the row of each item, by its key as text.
    values: for each joined field, its distinct values: texts, lists of texts, numbers, or the rows of an array, which
      are vectors.
    index: int32 `[items, joined fields]`, the place of an item's value among the field's values; -1 absent.
  """

  rows: Mapping[str, int]
  values: Mapping[str, Sequence[Any] | np.ndarray]
  index: np.ndarray


@dataclasses.dataclass
class EventCounts:
  """Counts of a user's events and of their values.

  Attributes:
    used: events before `as_of`, without duplicates; the embedding sees the last ones that fit, aggregates see all.
    ignored: events at or after `as_of`.
    duplicates: events that repeat another event, and were left out.
    items_missing: events without a key, or with a key that their table of items does not hold.
    unknown: values out of vocabulary, for each field with any.
    cut: values beyond the number that a field of many keeps, for each field with any.
    clipped: numbers so far from the training numbers that they were clipped, for each field with any.
  """

  used: int = 0
  ignored: int = 0
  duplicates: int = 0
  items_missing: int = 0
  unknown: dict[str, int] = dataclasses.field(default_factory=dict)
  cut: dict[str, int] = dataclasses.field(default_factory=dict)
  clipped: dict[str, int] = dataclasses.field(default_factory=dict)


class _FieldReader(NamedTuple):
  """The column of a field in one source's events, and the function that reads its values."""

  field: str
  column: str
  read: Callable[[Any], Any]
  joined: bool


class _Event(NamedTuple):
  """An event after reading: `values` has an entry a field: text, several texts, a number, a vector's bytes or None."""

  time: int
  source: int
  values: tuple[Any, ...]


class Preprocessing:
  """A reader of users' JSON; it is a `windows.Encoding`, as a dataset is."""

  def __init__(
    self,
    spec: PreprocessingSpec,
    categorical: Mapping[str, Categorical | VectorScale],
    numeric: Mapping[str, NumberEncoder],
    aggregator: Aggregator | None,
    statistics: Mapping[str, Sequence[float]],
    items: Mapping[str, ItemValues],
  ):
    """Takes the encoders of the fields, the aggregates with their `mean` and `scale`, and the tables of items."""
    self.spec, self.categorical, self.numeric, self.aggregator = spec, dict(categorical), dict(numeric), aggregator
    self.items = dict(items)
    self._scales = {n: e for n, e in self.categorical.items() if isinstance(e, VectorScale)}
    self.vector_columns = tuple(list(self.categorical).index(n) for n in self._scales)
    self.hidden_codes, self.hidden_numeric = spec.hidden_codes, spec.hidden_numeric
    self._mean, self._scale = (np.array(statistics[k], np.float32) for k in ("mean", "scale"))
    self._place = {name: i for i, name in enumerate(spec.fields)}
    self._readers = {name: self._field_readers(source) for name, source in spec.sources.items()}
    self._users = {
      name: {f: self._value_reader(f, spec.user_columns[c]) for f, c in source.user_fields.items()}
      for name, source in spec.sources.items()
    }
    self._keys = {n: text_reader(s.columns[s.item_key]) for n, s in spec.sources.items() if s.item_key}
    self._allowed = {
      n: {s.time, *(c for f, c in s.fields.items() if f not in s.user_fields), *([s.item_key] if s.item_key else ())}
      for n, s in spec.sources.items()
    }

  def _value_reader(self, field: str, kind: ColumnKind) -> Callable[[Any], Any]:
    spec = self.spec.fields[field]
    if spec.vector:
      return vector_reader(kind, spec.vector, spec.separator)
    if spec.numeric:
      return number_reader(kind, spec.log1p)
    return texts_reader(kind, spec.separator) if spec.many else text_reader(kind)

  def _field_readers(self, source: SourceSpec) -> list[_FieldReader]:
    own = {f: c for f, c in source.fields.items() if f not in source.user_fields}
    return [_FieldReader(f, c, self._value_reader(f, source.columns[c]), c in source.joined) for f, c in own.items()]

  # --------------------------------------------------------------------------------------------------------- one user

  def history(self, user: Mapping[str, Any], as_of: int) -> tuple[UserHistory, EventCounts]:
    """Returns a user's events before `as_of` (microseconds since 1970 UTC) in time order, and the counts of all events.

    Events at equal times keep their given order, and events of the config's earlier sources come first, as in
    preparation.

    Raises:
      InputError: a part of the user's JSON cannot be read.
    """
    counts = EventCounts()
    for key in user:
      if key not in (EVENTS, USER):
        raise InputError([], f"unknown key {key!r}{nearest(str(key), (EVENTS, USER))}")
    given = _mapping(user.get(EVENTS), [EVENTS])
    for name in given:
      if name not in self.spec.sources:
        raise InputError([EVENTS], f"there is no source {name!r}{nearest(str(name), self.spec.sources)}")
    known = self._known_of_user(user.get(USER))
    events: list[_Event] = []
    for number, name in enumerate(self.spec.sources):
      own = known.get(name, {})
      events += self._events(number, name, given.get(name), as_of, own, counts)
    if self.spec.drop_duplicates:
      kept = list(dict.fromkeys(events))
      counts.duplicates, events = len(events) - len(kept), kept
    counts.used = len(events)
    return self._history(events, counts), counts

  def _known_of_user(self, given: Any) -> dict[str, dict[str, Any]]:
    """Returns the values of the fields from the table of users, by source."""
    if given is None:
      return {}
    given = _mapping(given, [USER])
    for key in given:
      if key not in self.spec.user_columns:
        raise InputError([USER], f"unknown column {key!r}{nearest(str(key), self.spec.user_columns)}")
    return {
      name: {
        f: _read(read, given.get(c := self.spec.sources[name].user_fields[f]), [USER, c]) for f, read in of.items()
      }
      for name, of in self._users.items()
    }

  def _events(
    self, number: int, name: str, given: Any, as_of: int, known: Mapping[str, Any], counts: EventCounts
  ) -> list[_Event]:
    if given is None:
      return []
    if not isinstance(given, list | tuple):
      raise InputError([EVENTS, name], "it must be a list of events")
    source, readers, allowed, found = self.spec.sources[name], self._readers[name], self._allowed[name], []
    blank: list[Any] = [math.nan if f.numeric else None for f in self.spec.fields.values()]
    for field, value in known.items():
      blank[self._place[field]] = tuple(value) if type(value) is list else value
    read_time, column = source.time_kind.read, source.time
    for i, event in enumerate(given):
      place: tuple[str | int, ...] = (EVENTS, name, i)
      if type(event) is not dict and not isinstance(event, Mapping):
        raise InputError(place, "it must be an object of columns and values")
      if not event.keys() <= allowed:
        extra = next(k for k in event if k not in allowed)
        raise InputError(place, f"unknown column {extra!r}{nearest(str(extra), allowed)}")
      if event.get(column) in (None, ""):
        raise InputError([*place, column], f"the time is missing; it should be {source.time_kind.wanted}")
      time = _read(read_time, event[column], [*place, column])
      if time >= as_of:
        counts.ignored += 1
        continue
      item = self._item(name, event, place, counts)
      values = blank.copy()
      for field, at, read, joined in readers:
        if joined and at not in event:
          value = item.get(field)
        else:
          try:
            value = read(event.get(at))
          except ValueProblem as problem:
            raise InputError([*place, at], str(problem)) from None
        if value is not None:
          values[self._place[field]] = tuple(value) if type(value) is list else value
      found.append(_Event(time, number, tuple(values)))
    return found

  def _item(
    self, name: str, event: Mapping[str, Any], place: Sequence[str | int], counts: EventCounts
  ) -> dict[str, Any]:
    """Returns an event's values from the source's table of items, by field."""
    source = self.spec.sources[name]
    if not source.item_key:
      return {}
    key = _read(self._keys[name], event.get(source.item_key), [*place, source.item_key])
    items = self.items[name]
    row = None if key is None else items.rows.get(key)
    if row is None:
      counts.items_missing += 1
      return {}
    places = items.index[row].tolist()
    found = {f: values[at] for (f, values), at in zip(items.values.items(), places, strict=True) if at >= 0}
    return {f: v.tobytes() if isinstance(v, np.ndarray) else v for f, v in found.items()}

  def _history(self, events: Sequence[_Event], counts: EventCounts) -> UserHistory:
    n = len(events)
    time = np.fromiter((e.time for e in events), np.int64, n)
    order = np.argsort(time, kind="stable")
    codes = np.zeros((n, len(self.categorical) + len(self.spec.extra_columns)), np.int32)
    numeric = np.full((n, len(self.numeric)), np.nan, np.float32)
    own = []
    for column, (name, encoder) in enumerate(self.categorical.items()):
      values, many = [e.values[self._place[name]] for e in events], self.spec.fields[name].many
      if isinstance(encoder, VectorScale):
        rows = {v: i for i, v in enumerate(dict.fromkeys(v for v in values if v is not None), FIRST_VALUE)}
        own.append(np.frombuffer(b"".join(rows), np.float32).reshape(-1, encoder.size))
        codes[:, column] = [ABSENT if v is None else rows[v] for v in values]
        continue
      if many:
        counted = sum(max(len(v) - many, 0) for v in values if v)
        counts.cut |= {name: counted} if counted else {}
        extra_columns = [len(self.categorical) + i for i, f in enumerate(self.spec.extra_columns) if f == name]
        for i, c in enumerate([column, *extra_columns]):
          codes[:, c] = [encoder.code(v[i] if v and len(v) > i else None) for v in values]
        unknown = int(np.sum(codes[:, [column, *extra_columns]] == UNKNOWN))
      else:
        codes[:, column] = [encoder.code(v) for v in values]
        unknown = int(np.sum(codes[:, column] == UNKNOWN))
      counts.unknown |= {name: unknown} if unknown else {}
    for column, (name, numbers) in enumerate(self.numeric.items()):
      raw = np.array([e.values[self._place[name]] for e in events], np.float64)
      numeric[:, column] = numbers.encode_all(raw)
      if clipped := int(numbers.clips(raw).sum()):
        counts.clipped[name] = clipped
    source = np.fromiter((e.source for e in events), np.int32, n)
    return UserHistory("", time[order], source[order], codes[order], numeric[order], n, tuple(own))

  def vectors(self, codes: np.ndarray, own: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """Returns the vectors with `codes […, K]`, each a row of a field's `own` vectors, as a dataset does."""
    rows = zip(self._scales.values(), own or (), strict=True)
    return concatenated([scale.looked_up(codes[..., i], of) for i, (scale, of) in enumerate(rows)], codes.shape[:-1])

  def aggregates(self, block: UserBlock, user: np.ndarray, time: np.ndarray, n_events: np.ndarray) -> np.ndarray:
    """Returns standardised aggregates `[S, A]` at snapshots, as a dataset does; A is 0 if the config has none."""
    if self.aggregator is None:
      return np.zeros((len(time), 0), np.float32)
    return (self.aggregator(block, user, time, n_events) - self._mean) / self._scale

  def row(self, history: UserHistory, as_of: int, length: int) -> Features:
    """Returns the last events of a history, and a snapshot at `as_of`, as a row of `length` events.

    A history without events gives a row of padding, which shows the shapes.
    """
    n = len(history.time)
    time, seen = np.array([as_of] if n else [], np.int64), np.array([n] if n else [], np.int32)
    start = max(0, n - min(length, self.spec.max_events))
    aggregates = None if n else np.zeros((0, len(self._mean) if self.aggregator else 0), np.float32)
    return windows.window(self, history, start, n, time, seen, length, 1, aggregates)

  @property
  def empty(self) -> UserHistory:
    """Returns a history without events."""
    return self._history([], EventCounts())

  # ------------------------------------------------------------------------------------------------------------- files

  def save(self, path: pathlib.Path) -> None:
    """Writes `preprocessing.json` and the files that it names into a directory."""
    files: dict[int, str] = {}
    saved: dict[str, Any] = {"spec": dataclasses.asdict(self.spec), "categorical": {}, "numeric": {}, "items": {}}
    for name, encoder in self.categorical.items():
      if isinstance(encoder, Hashing):
        saved["categorical"][name] = {"kind": "hash", **dataclasses.asdict(encoder)}
        continue
      if isinstance(encoder, VectorScale):
        saved["categorical"][name] = {"kind": "vector", "size": encoder.size, "scale": encoder.scale}
        continue
      file = files.setdefault(id(encoder), f"vocabulary-{len(files)}.json")  # fields may share one
      (path / file).write_text(json.dumps(encoder.values) + "\n")
      saved["categorical"][name] = {"kind": "vocabulary", "file": file, "buckets": encoder.buckets}
    saved["numeric"] = {n: dataclasses.asdict(e) for n, e in self.numeric.items()}
    saved["aggregator"] = None if self.aggregator is None else self.aggregator.to_json()
    if self.aggregator is not None:
      factors.save_factors(path, {n: of.factors for n, of in self.aggregator.factors.items()})
    saved["statistics"] = {"mean": self._mean.tolist(), "scale": self._scale.tolist()}
    for i, (name, items) in enumerate(self.items.items()):
      file = f"items-{i}"
      vectors = {n: v for n, v in items.values.items() if isinstance(v, np.ndarray)}
      values = {n: None if n in vectors else v for n, v in items.values.items()}  # in the order of the fields
      (path / f"{file}.json").write_text(json.dumps({"keys": list(items.rows), "values": values}) + "\n")
      for n, rows in vectors.items():
        np.save(path / f"{file}-{list(values).index(n)}.npy", rows, allow_pickle=False)
      np.save(path / f"{file}.npy", items.index, allow_pickle=False)
      saved["items"][name] = file
    (path / FILE).write_text(json.dumps(saved, indent=1) + "\n")

  @classmethod
  def load(cls, path: pathlib.Path) -> Preprocessing:
    """Reads the directory that `save` wrote."""
    saved = json.loads((path / FILE).read_text())
    vocabularies: dict[str, Vocabulary] = {}
    categorical: dict[str, Categorical | VectorScale] = {}
    for name, of in saved["categorical"].items():
      if (kind := of.pop("kind")) != "vocabulary":
        categorical[name] = Hashing(**of) if kind == "hash" else VectorScale(**of)
        continue
      if of["file"] not in vocabularies:
        values = json.loads((path / of["file"]).read_text())
        vocabularies[of["file"]] = Vocabulary(values, np.zeros(len(values), np.int64), of["buckets"])
      categorical[name] = vocabularies[of["file"]]
    items = {}
    for name, file in saved["items"].items():
      held = json.loads((path / f"{file}.json").read_text())
      of_fields = {
        n: np.load(path / f"{file}-{i}.npy", mmap_mode="r", allow_pickle=False) if v is None else v
        for i, (n, v) in enumerate(held["values"].items())
      }
      rows = {k: i for i, k in enumerate(held["keys"])}
      items[name] = ItemValues(rows, of_fields, np.load(path / f"{file}.npy", allow_pickle=False))
    numeric = {n: number_encoder(of) for n, of in saved["numeric"].items()}
    spec, aggregator = spec_from_json(saved["spec"]), saved["aggregator"]
    if aggregator is not None:
      encodings = {n: "log1p" if f.log1p else "standardise" for n, f in spec.fields.items()}
      fitted = factors.load_factors(path, aggregator.get("factors", ()))
      bind = functools.partial(bind_aggregate, categorical=categorical, numeric=numeric, encodings=encodings)
      aggregator = Aggregator.from_json(aggregator, bind, fitted)
    return cls(spec, categorical, numeric, aggregator, saved["statistics"], items)


def _mapping(value: Any, place: Sequence[str | int]) -> Mapping[str, Any]:
  if not isinstance(value, Mapping):
    raise InputError(place, "it must be an object" + (", with the events of each source" if place == [EVENTS] else ""))
  return typing.cast(Mapping[str, Any], value)


def _read(read: Callable[[Any], Any], value: Any, place: Sequence[str | int]) -> Any:
  try:
    return read(value)
  except ValueProblem as problem:
    raise InputError(place, str(problem)) from None


def total_counts(counts: Sequence[Mapping[str, int]]) -> collections.Counter[str]:
  """Returns the sum of several users' counts of each field."""
  out: collections.Counter[str] = collections.Counter()
  for of in counts:
    out.update(of)
  return out
