"""Opens an exported encoder, which turns raw events as JSON into user embeddings; needs only JAX and NumPy.

    from supermoe_jax.serving import loader

    encoder = loader.load_encoder("runs/cj/encoder")
    found = encoder.embed([{"events": {"purchases": [{"transaction_timestamp": …, "product_id": …}]}}], "2017-11-01")
    found.vectors                                                 # [users, width]

`ExportedEncoder.schema` lists what a user's JSON may hold, and `serving.json_values` explains it in words. This module
also works where the package is installed without its dependencies (`pip install --no-deps supermoe_jax`).

Shapes: n users, B rows, L events of a row, D width.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import ml_dtypes  # noqa: F401 (NumPy knows bfloat16 by it)
import numpy as np

from supermoe_jax.batch import Features
from supermoe_jax.data.dataset import windows
from supermoe_jax.errors import DataError
from supermoe_jax.serving import preprocessing as preprocessing_lib
from supermoe_jax.serving import stablehlo as stablehlo_lib
from supermoe_jax.serving.json_values import AS_OF, ColumnKind, ValueProblem
from supermoe_jax.serving.preprocessing import EventCounts, InputError, Preprocessing

__all__ = ["Embedded", "ExportedEncoder", "InputError", "Prepared", "load_encoder"]

# The ways in which a caller gives a time.
Moment = str | datetime.date | np.datetime64

KIND = "encoder"
MANIFEST, PARAMETERS = "manifest.json", "parameters"


class Embedded(NamedTuple):
  """Embeddings of n users.

  Attributes:
    vectors: float32 `[n, D]`; NaN for a user without an event before `as_of`: nothing is known of that user.
    counts: for each user, the counts of used and dropped events.
  """

  vectors: np.ndarray
  counts: list[EventCounts]

  @property
  def unknown(self) -> dict[str, int]:
    """Returns the number of values out of vocabulary, for each field."""
    return dict(preprocessing_lib.total_counts([c.unknown for c in self.counts]))

  @property
  def clipped(self) -> dict[str, int]:
    """Returns the number of clipped numbers, for each field; see `encoding.numeric.MOST_DEVIATIONS`."""
    return dict(preprocessing_lib.total_counts([c.clipped for c in self.counts]))

  @property
  def used(self) -> int:
    """Returns the number of events before `as_of`."""
    return sum(c.used for c in self.counts)

  @property
  def ignored(self) -> int:
    """Returns the number of events at or after `as_of`."""
    return sum(c.ignored for c in self.counts)


class Prepared(NamedTuple):
  """A user after reading: a row of L events without a batch dimension, or None without events; and the counts."""

  row: Features | None
  counts: EventCounts

  @property
  def length(self) -> int:
    """Returns L; 0 without events."""
    return 0 if self.row is None else len(self.row.segment)


class ExportedEncoder:
  """An exported encoder; threads may share it. Programs are compiled at their first use, or by `warm_up`."""

  def __init__(self, path: pathlib.Path, manifest: Mapping[str, Any]):
    """Opens the directory `path`; see `load_encoder`."""
    self.path, self.manifest = path, manifest
    self.width, self.max_events = int(manifest["width"]), int(manifest["max_events"])
    self.batch_sizes, self.lengths = tuple(manifest["batch_sizes"]), tuple(manifest["lengths"])
    self.preprocessing = Preprocessing.load(path)
    host = {name: _parameter(path, name, of) for name, of in manifest["parameters"].items()}
    self.padding = {n: self.preprocessing.row(self.preprocessing.empty, 0, n) for n in self.lengths}
    # Programs by (B, L).
    self.programs: dict[tuple[int, int], jax.export.Exported] = {}
    for of in manifest["programs"]:
      of = dict(of)
      stablehlo = _checked(path, of.pop("file"), manifest)
      facts = stablehlo_lib.ProgramSignature(**{**of, "platforms": tuple(of["platforms"]), "kept": tuple(of["kept"])})
      size = facts.batch, facts.events
      self.programs[size] = stablehlo_lib.open_program(facts, stablehlo, host, self.padding[facts.events], self.width)
    self.parameters = jax.device_put(host)
    self._compiled: dict[tuple[int, int], Callable[..., jax.Array]] = {}
    self._lock = threading.Lock()

  @property
  def schema(self) -> dict[str, Any]:
    """Returns what a user's JSON may hold: the time and the columns of each source, and the columns of a user."""
    spec, out = self.preprocessing.spec, {}
    for name, source in spec.sources.items():
      own = {f: c for f, c in source.fields.items() if f not in source.user_fields}
      described = {}
      for column, kind in source.columns.items():
        fields = [f for f, c in own.items() if c == column]
        described[column] = {
          "kind": kind.name,
          "fields": fields,
          "many": max((spec.fields[f].many for f in fields), default=0),
          "numeric": any(spec.fields[f].numeric for f in fields),
          "from_items": column in source.joined,
          "item_key": column == source.item_key,
          **({"vector": size} if (size := max((spec.fields[f].vector for f in fields), default=0)) else {}),
        }
      out[name] = {"time": {"column": source.time, "wanted": source.time_kind.wanted}, "columns": described}
    return {
      "sources": out,
      "user": {column: self._described_of_user(column, kind) for column, kind in spec.user_columns.items()},
      "max_events": self.max_events,
      "width": self.width,
    }

  def _described_of_user(self, column: str, kind: ColumnKind) -> dict[str, Any]:
    spec = self.preprocessing.spec
    sizes = [spec.fields[f].vector for s in spec.sources.values() for f, c in s.user_fields.items() if c == column]
    return {"kind": kind.name, **({"vector": size} if (size := max(sizes, default=0)) else {})}

  def embed(self, users: Sequence[Mapping[str, Any]], as_of: Moment | Sequence[Moment]) -> Embedded:
    """Embeds users as of one time, or as of a time each. Ignores events from then on.

    A time is ISO 8601 text, a date or a datetime, each UTC without an offset.

    Raises:
      InputError: a user's JSON or a time cannot be read; the place in the error begins with the user's index.
    """
    times: list[Any] = [as_of] * len(users)
    if isinstance(as_of, Sequence | np.ndarray) and not isinstance(as_of, str):
      times = list(as_of)
    if len(times) != len(users):
      raise InputError(["as_of"], f"{len(times)} times for {len(users)} users; give one, or one a user")
    prepared = [self.prepare(user, time, [i]) for i, (user, time) in enumerate(zip(users, times, strict=True))]
    return Embedded(self.run(prepared), [p.counts for p in prepared])

  def prepare(self, user: Mapping[str, Any], as_of: Moment, place: Sequence[str | int] = ()) -> Prepared:
    """Reads one user; messages put `place` before their places.

    Raises:
      InputError: the JSON or the time cannot be read.
    """
    time = parse_moment(as_of)
    if not isinstance(user, Mapping):
      raise InputError(place, "it must be an object, such as {'events': {…}}")
    try:
      history, counts = self.preprocessing.history(user, time)
    except InputError as error:
      raise InputError([*place, *error.place], error.problem) from None
    if not counts.used:
      return Prepared(None, counts)
    length = next(n for n in self.lengths if n >= min(counts.used, self.max_events))
    return Prepared(self.preprocessing.row(history, time, length), counts)

  def run(self, prepared: Sequence[Prepared]) -> np.ndarray:
    """Returns the embeddings of prepared users: float32 `[n, D]`; NaN for users without events."""
    vectors = np.full((len(prepared), self.width), np.nan, np.float32)
    for length in self.lengths:
      places = [i for i, p in enumerate(prepared) if p.row is not None and p.length == length]
      for size, part in self._cut(places):
        rows = [prepared[i].row for i in part] + [self.padding[length]] * (size - len(part))
        vectors[part] = np.asarray(self._program(size, length)(self.parameters, tuple(windows.stack(rows))))[
          : len(part)
        ]
    return vectors

  def _cut(self, places: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Cuts rows into batches of the exported sizes with little padding; yields each size with its rows."""
    rest = list(places)
    while rest:
      larger = next((b for b in self.batch_sizes if b >= len(rest)), None)
      smaller = max((b for b in self.batch_sizes if b <= len(rest)), default=None)
      size = larger if larger is not None and (smaller is None or larger <= 2 * len(rest)) else smaller
      assert size is not None
      yield size, rest[:size]
      rest = rest[size:]

  def _program(self, batch: int, length: int) -> Callable[..., jax.Array]:
    with self._lock:
      if (batch, length) not in self._compiled:
        shapes = stablehlo_lib.argument_shapes(self.parameters, self.padding[length], batch)
        self._compiled[batch, length] = jax.jit(self.programs[batch, length].call).lower(*shapes).compile()
      return self._compiled[batch, length]

  def warm_up(self, said: Callable[[int, int], None] | None = None) -> None:
    """Compiles every program and runs it once; calls `said(B, L)` for each program that is ready."""
    for batch, length in sorted(self.programs):
      features = tuple(windows.stack([self.padding[length]] * batch))
      jax.block_until_ready(self._program(batch, length)(self.parameters, features))
      if said is not None:
        said(batch, length)


def parse_moment(as_of: Any) -> int:
  """Returns the requested time in microseconds since 1970 UTC.

  Raises:
    InputError: `as_of` is not a time.
  """
  if isinstance(as_of, datetime.date):  # or a datetime, which is a date too
    as_of = as_of.isoformat()
  elif isinstance(as_of, np.datetime64):
    as_of = str(as_of.astype("datetime64[us]"))
  try:
    return AS_OF.read(as_of)
  except ValueProblem as problem:
    raise InputError(["as_of"], str(problem)) from None


def load_encoder(path: str | os.PathLike[str]) -> ExportedEncoder:
  """Opens a directory that 'supermoe export' wrote.

  Raises:
    DataError: there is no exported encoder, a file has changed since, or the installed JAX cannot call it.
  """
  path = pathlib.Path(path)
  file = path / MANIFEST
  if not file.is_file():
    raise DataError(f"{path} holds no exported encoder (no {MANIFEST}); run 'supermoe export' first.")
  try:
    manifest = json.loads(file.read_text())
  except ValueError as error:
    raise DataError(f"{file} is damaged ({error}); export again.") from None
  if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
    raise DataError(f"{path} holds no exported encoder; name another directory.")
  for name in manifest["files"]:
    _checked(path, name, manifest)
  return ExportedEncoder(path, manifest)


def _checked(path: pathlib.Path, name: str, manifest: Mapping[str, Any]) -> bytes:
  """Returns the content of a file; raises DataError if it has changed since the export."""
  try:
    content = (path / name).read_bytes()
  except OSError as error:
    raise DataError(f"{path / name} cannot be read ({error}); export again.") from None
  if hashlib.sha256(content).hexdigest() != manifest["files"][name]:
    raise DataError(f"{path / name} is not as it was written; export again.")
  return content


def _parameter(path: pathlib.Path, name: str, of: Mapping[str, Any]) -> np.ndarray:
  """Returns a parameter, mapped into memory rather than read."""
  file = path / of["file"]
  try:
    if file.stat().st_size != of["bytes"]:
      raise DataError(f"{file} ({name}) has {file.stat().st_size} bytes, not {of['bytes']}; export again.")
    value = np.load(file, mmap_mode="r", allow_pickle=False)
  except (OSError, ValueError) as error:
    if isinstance(error, DataError):
      raise
    raise DataError(f"{file} ({name}) cannot be read ({error}); export again.") from None
  dtype = np.dtype(of["dtype"])
  value = value if value.dtype == dtype else value.view(dtype)
  if list(value.shape) != of["shape"]:
    raise DataError(f"{file} ({name}) is of shape {value.shape}, not {tuple(of['shape'])}; export again.")
  return value


def counts_json(counts: EventCounts) -> dict[str, Any]:
  """Returns counts as a dictionary for JSON."""
  return dataclasses.asdict(counts)
