"""Derives aggregates of some snapshots again from the raw events, by SQL that shares no code with their computation.

Each aggregate becomes an interval, because records hold numbers as float32, and because a value that an append added
stays out of vocabulary in earlier events. The means and the distinct counts of numbers take their encoders; the mean of
a field that is encoded as quantiles is not derived.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import duckdb
import numpy as np

from supermoe_jax.batch import ABSENT
from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data.check.condition_sql import asked_sql, events_sql
from supermoe_jax.data.check.raw_events import field_column
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding.aggregates import WEEKDAYS, Aggregator
from supermoe_jax.data.encoding.factors import Factors
from supermoe_jax.data.encoding.numeric import LARGEST, MOST_DEVIATIONS, Numeric
from supermoe_jax.data.encoding.vectors import Vectors
from supermoe_jax.data.encoding.vocabulary import Vocabulary
from supermoe_jax.data.reading import readers

TOLERANCE = 1e-5  # of an aggregate, which is float32
ROUNDING = 1e-6  # of an encoded number, in deviations
HOUR = 3_600_000_000

# Conditions that an event lies in a part of the week or of the day, by the names of habits.
_HABITS = {
  **{day: f"dayname(make_timestamp(e.time)) = '{day}'" for day in WEEKDAYS},
  **{f"{h:02d}-{h + 3:02d}h": f"hour(make_timestamp(e.time)) BETWEEN {h} AND {h + 2}" for h in range(0, 24, 3)},
}


class DerivedBounds(NamedTuple):
  """The bounds of a derived number."""

  low: float
  high: float

  def holds(self, value: float) -> bool:
    """Returns whether a float32 number may be the derived one."""
    low, high = (b + sign * TOLERANCE * (1 + abs(b)) for b, sign in ((self.low, -1), (self.high, 1)))
    return low <= value <= high


Row = dict[str, Any]
Derivation = Callable[[Row], DerivedBounds]


def clipped_sql(dataset: Dataset, field: str) -> str:
  """Returns the SQL of a raw number of an event `e`, clipped as the records' encoding clips it."""
  column, encoder = f"e.{field_column(dataset.config.data, field)}", dataset.encoders.numeric[field]
  assert isinstance(encoder, Numeric)  # config.resolve checked
  bounds = np.array([-MOST_DEVIATIONS, MOST_DEVIATIONS])
  with np.errstate(over="ignore"):  # of log1p the bounds may be beyond all numbers
    low, high = encoder.decode_all(bounds, dataset.config.data.fields[field].encoding)
  within = f"least(greatest({column}, '{float(low)}'::DOUBLE), '{float(high)}'::DOUBLE)"
  return f"CASE WHEN {column} IS NOT NULL THEN {within} END"  # least and greatest pass over NULL


class DifferingAggregate(NamedTuple):
  """An aggregate that differs from the raw files: its snapshot's index in the sample, its name and its two values."""

  snapshot: int
  name: str
  stored: float
  derived: float


def differing_aggregate(
  con: duckdb.DuckDBPyConnection, dataset: Dataset, asked: Sequence[tuple[Mapping[str, Any], int, int]]
) -> DifferingAggregate | None:
  """Returns the first aggregate that differs from the tables `asked` and `events`; None if all agree.

  `asked` holds the record, the time (µs) and the number of visible events of each row of the table `asked`. Values are
  compared before they are standardised.
  """
  if dataset.aggregator is None:
    return None
  aggregator, derived = dataset.aggregator, _derive(con, dataset, dataset.aggregator)
  for _, group in itertools.groupby(enumerate(asked), key=lambda pair: id(pair[1][0])):
    numbers, of_user = zip(*group, strict=True)
    time, n_events = (np.array([a[k] for a in of_user], np.int64) for k in (1, 2))
    rows = aggregator(dataset.history(of_user[0][0]).block, np.zeros(len(time), np.int64), time, n_events)
    for index, row in zip(numbers, rows.tolist(), strict=True):
      for name, value in zip(aggregator.names, row, strict=True):
        interval = derived[index].get(name)
        if interval is not None and not interval.holds(value):
          return DifferingAggregate(index, name, value, interval.low)
  return None


def _derive(con: duckdb.DuckDBPyConnection, dataset: Dataset, aggregator: Aggregator) -> list[dict[str, DerivedBounds]]:
  """Returns the intervals of the aggregates, by name, of each row of the table `asked`, from the table `events`."""
  days: list[float | None] = [*aggregator.windows_days, None]
  out: list[dict[str, DerivedBounds]] = []
  derive, conditions = _Derivations(dataset, aggregator), dataset.config.data.aggregates.conditions.values()
  events = events_sql(dataset.config.data, " and ".join(f"({where})" for where in conditions), dataset.encoders)
  for name, length in zip(aggregator.windows, days, strict=True):
    derivations = derive.of_window(name, length)
    since = "true" if length is None else f"e.time >= a.time - {int(length * MICROSECONDS_PER_DAY)}"
    columns = ", ".join(f"{sql} AS {readers.identifier(key)}" for key, sql in derive.columns.items())
    far = "true" if length is None else f"e.time >= a.time - {2 * int(length * MICROSECONDS_PER_DAY)}"
    found = con.execute(
      f"SELECT a.id, any_value(a.time) AS at, {columns.replace('{inside}', since)} FROM asked a LEFT JOIN {events} e "
      f'ON e."user" = a."user" AND e.position < a.n_events AND {far} GROUP BY a.id ORDER BY a.id'
    )
    names = [column[0] for column in found.description or ()]
    rows = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    out = out or [{} for _ in rows]
    for intervals, row in zip(out, rows, strict=True):
      intervals |= {aggregate: interval(row) for aggregate, interval in derivations.items()}
  return out


class _Derivations:
  """The columns of a query and, for each aggregate, the function from a row of its result to an interval.

  Columns hold `{inside}` where the condition belongs that an event lies in the window.
  """

  def __init__(self, dataset: Dataset, aggregator: Aggregator):
    self._dataset, self._data, self._aggregator = dataset, dataset.config.data, aggregator
    self.columns: dict[str, str] = {}

  def of_window(self, window: str, days: float | None) -> dict[str, Derivation]:
    """Returns the aggregates of a window; of None days those of the whole history."""
    self.columns, wanted = {}, self._data.aggregates
    out = {f"events {s} {window}": self._count(f"e.source = {i}") for i, s in enumerate(self._data.sources)}
    out[f"moments {window}"] = self._logged("count(DISTINCT e.time)")
    for name in self._aggregator.numeric:
      if isinstance(self._dataset.encoders.numeric[name], Numeric):
        out[f"mean {name} {window}"] = self._encoded_mean(name)
    for name, (_, values) in self._aggregator.values.items():
      column = field_column(self._data, name)
      for value in values:
        out[f"{name} {value} {window}"] = self._count(f"e.{column} = {readers.literal(value)}")
      if days is None:
        out[f"distinct {name}"] = self._distinct(name)
    out |= {f"sum {name} {window}": self._amount(name, average=False) for name in wanted.sums}
    out |= {f"average {name} {window}": self._amount(name, average=True) for name in wanted.means}
    if days is not None:
      before = f"e.time < a.time - {int(days * MICROSECONDS_PER_DAY)}"
      out |= {f"trend {name} {window}": self._trend(name, before) for name in wanted.trends}
    out |= {f"distinct {name} {window}": self._distinct(name) for name in wanted.distinct}
    for name, where in wanted.conditions.items():
      out[f"count {name} {window}"] = self._count(asked_sql(self._data, where))
    if wanted.habits and days in (None, max(wanted.windows_days, default=None)):
      out |= {f"share of {part} {window}": self._share(sql) for part, sql in _HABITS.items()}
    if days is None:
      for name, of in self._aggregator.factors.items():
        out |= self._factors(name, of.factors)
      last, first = self._column("max(e.time)"), self._column("min(e.time)")
      if wanted.paces:
        for name, length in zip(self._aggregator.windows, wanted.windows_days):
          out |= {f"pace {n} {name}": self._pace(n, length, first) for n in ("moments", *wanted.sums)}
      out["recency"] = lambda row: _point(math.log1p((row["at"] - row[last]) / HOUR))
      out["tenure"] = lambda row: _point(math.log1p((row["at"] - row[first]) / HOUR))
    return out

  def _column(self, expression: str, condition: str = "{inside}") -> str:
    """Returns the name of a column of an aggregate function over the events that fulfil a condition."""
    name = f"c{len(self.columns)}"
    self.columns[name] = f"{expression} FILTER (e.time IS NOT NULL AND {condition})"
    return name

  def _logged(self, expression: str, condition: str = "{inside}") -> Derivation:
    name = self._column(expression, condition)
    return lambda row: _point(math.log1p(row[name]))

  def _count(self, condition: str) -> Derivation:
    return self._logged("count(e.time)", f"{{inside}} AND {condition}")

  def _share(self, condition: str) -> Derivation:
    name = self._column("count(DISTINCT e.time)", f"{{inside}} AND {condition}")
    moments = self._column("count(DISTINCT e.time)")
    return lambda row: _point(row[name] / max(row[moments], 1))

  def _encoded_mean(self, field: str) -> Derivation:
    column, encoder = f"e.{field_column(self._data, field)}", self._dataset.encoders.numeric[field]
    assert isinstance(encoder, Numeric)
    if self._data.fields[field].encoding == "log1p":
      column = f"(sign({column}) * ln(1 + abs({column})))"
    deviation = f"({column} - {encoder.mean!r}::DOUBLE) / {encoder.std!r}::DOUBLE"
    within = f"least(greatest({deviation}, -{MOST_DEVIATIONS}), {MOST_DEVIATIONS})"
    encoded = f"CASE WHEN {column} IS NOT NULL THEN {within} END"
    name, size = self._column(f"avg({encoded})"), self._column(f"avg(abs({encoded}))")
    return lambda row: _bounds(row[name] or 0.0, ROUNDING * (row[size] or 0.0))

  def _summed(self, field: str, condition: str = "{inside}") -> Callable[[Row], tuple[DerivedBounds, int]]:
    """Returns the function from a row to the sum of the raw numbers and their count."""
    encoder = self._dataset.encoders.numeric[field]
    assert isinstance(encoder, Numeric)
    number = f"least(greatest(({clipped_sql(self._dataset, field)}), -{LARGEST!r}::DOUBLE), {LARGEST!r}::DOUBLE)"
    held = f"{condition} AND e.{field_column(self._data, field)} IS NOT NULL"
    total, size = self._column(f"sum({number})", held), self._column(f"sum(abs({number}))", held)
    count = self._column("count(e.time)", held)
    # A standardised number is rounded in deviations; log1p rounds a logarithm, so its number by a share.
    log = self._data.fields[field].encoding == "log1p"
    share = ROUNDING * (1 + encoder.std + abs(encoder.mean)) if log else ROUNDING
    each = 0.0 if log else ROUNDING * (encoder.std + abs(encoder.mean))
    return lambda row: (_bounds(row[total] or 0.0, share * (row[size] or 0.0) + each * row[count]), row[count])

  def _amount(self, field: str, *, average: bool) -> Derivation:
    summed = self._summed(field)

    def interval(row: Row) -> DerivedBounds:
      total, count = summed(row)
      return DerivedBounds(*(_signed_log(b / (max(count, 1) if average else 1)) for b in total))

    return interval

  def _trend(self, field: str, before: str) -> Derivation:
    recent, former = self._summed(field), self._summed(field, before)

    def interval(row: Row) -> DerivedBounds:
      (now, _), (then, _) = recent(row), former(row)
      return DerivedBounds(_signed_log(now.low) - _signed_log(then.high), _signed_log(now.high) - _signed_log(then.low))

    return interval

  def _pace(self, what: str, days: float, first: str) -> Derivation:
    """Returns the pace of a window; `first` is the column of the user's first time."""
    length = int(days * MICROSECONDS_PER_DAY)
    conditions = f"e.time >= a.time - {length}", "true"
    if what == "moments":
      names = [self._column("count(DISTINCT e.time)", condition) for condition in conditions]
      sums = []
    else:
      names, sums = [], [self._summed(what, condition) for condition in conditions]

    def interval(row: Row) -> DerivedBounds:
      now, whole = [_point(row[name]) for name in names] or [of(row)[0] for of in sums]
      share = min(days * MICROSECONDS_PER_DAY / max(row["at"] - row[first], 1), 1.0)
      usual = [_signed_log(bound * share) for bound in whole]
      return DerivedBounds(_signed_log(now.low) - usual[1], _signed_log(now.high) - usual[0])

    return interval

  def _distinct(self, field: str) -> Derivation:
    column, many = f"e.{field_column(self._data, field)}", self._data.fields[field].many
    values = f"list({column}[1:{many}])" if many else f"list(DISTINCT {column})"
    name = self._column(values, f"{{inside}} AND {column} IS NOT NULL")
    if field in self._dataset.encoders.numeric:
      return lambda row: self._distinct_numbers(field, row[name] or ())
    encoder = self._dataset.encoders.categorical[field]
    assert not isinstance(encoder, Vectors)  # config.resolve checked
    own = self._data.fields[field].shares or field
    added = sum(a["vocabularies"].get(own, {}).get("added", 0) for a in self._dataset.manifest.get("appends", ()))
    first = encoder
    if added and isinstance(encoder, Vocabulary):
      known = len(encoder.values) - added
      first = Vocabulary(encoder.values[:known], encoder.counts[:known], encoder.buckets)

    def interval(row: Row) -> DerivedBounds:
      found = itertools.chain(*(row[name] or ())) if many else row[name] or ()
      values = set(found)
      now, then = (len({e.code(v) for v in values} - {ABSENT}) for e in (encoder, first))
      return DerivedBounds(math.log1p(min(now, then)), math.log1p(now + 1 if added else now))

    return interval

  def _factors(self, field: str, factors: Factors) -> dict[str, Derivation]:
    """Returns the factors of a field: how often the user had each code, times the stored weights and directions."""
    column, many = f"e.{field_column(self._data, field)}", self._data.fields[field].many
    held = f"{{inside}} AND {column} IS NOT NULL"
    name = self._column(f"list({column}{f'[1:{many}]' if many else ''} ORDER BY e.position)", held)
    numbered = self._data.aggregates.factor_numbers.get(field)
    of_events = None if numbered is None else f"e.{field_column(self._data, numbered)}"
    number = None if of_events is None else self._column(f"list({of_events} ORDER BY e.position)", held)
    encoder = self._dataset.encoders.categorical[field]
    assert not isinstance(encoder, Vectors)  # config.resolve checked

    def derive(row: Row) -> np.ndarray:
      values = itertools.chain(*(row[name] or ())) if many else row[name] or ()
      counted = collections.Counter(map(encoder.code, values))
      codes = [code for code in counted if code < len(factors.weight)]  # a value that an append added has no factors
      entries = np.array([factors.weight[code] * math.log1p(counted[code]) for code in codes])
      found = entries @ factors.direction[codes] / (np.linalg.norm(entries) or 1.0)
      return found if number is None else found + of_numbers(row, row[number] or ())

    def of_numbers(row: Row, numbers: Sequence[float | None]) -> np.ndarray:
      """Returns what the numbers of the first event with each value add."""
      assert numbered is not None and factors.usual is not None and factors.above is not None
      encode, encoding = self._dataset.encoders.numeric[numbered].encode, self._data.fields[numbered].encoding
      met: set[int] = set()
      entries = np.zeros(len(factors.weight))
      for values, raw in zip(row[name] or (), numbers, strict=True):
        for code in map(encoder.code, values if many else (values,)):
          if raw is not None and code not in met and code < len(entries):
            above = float(encode(raw, encoding)) - factors.usual[code]
            entries[code] = factors.weight[code] * math.log(2) * above
          met.add(code)
      return entries @ factors.above / math.sqrt(1 + float(entries @ entries))

    def one(i: int) -> Derivation:
      return lambda row: _point(float(self._once(name, row, derive)[i]))

    return {f"factor {field} {i + 1}": one(i) for i in range(factors.size)}

  def _once(self, name: str, row: Row, derive: Callable[[Row], np.ndarray]) -> np.ndarray:
    """Returns `derive(row)`, which the row keeps for the other factors of the field."""
    kept = f"factors {name}"
    if kept not in row:
      row[kept] = derive(row)
    return np.asarray(row[kept])

  def _distinct_numbers(self, field: str, numbers: Iterable[float]) -> DerivedBounds:
    """Returns the interval of the count of distinct numbers: two that nearly agree may be one after encoding."""
    raw: Sequence[float] = sorted(set(numbers))
    encoding = self._data.fields[field].encoding
    encoded = np.array([self._dataset.encoders.numeric[field].encode(n, encoding) for n in raw], np.float64)
    apart = int(np.sum(np.diff(encoded) > ROUNDING * (1 + np.abs(encoded[1:])))) + 1 if len(encoded) else 0
    return DerivedBounds(math.log1p(apart), math.log1p(len(raw)))


def _point(value: float) -> DerivedBounds:
  return DerivedBounds(value, value)


def _bounds(value: float, tolerance: float) -> DerivedBounds:
  return DerivedBounds(value - tolerance, value + tolerance)


def _signed_log(value: float) -> float:
  return math.copysign(math.log1p(abs(value)), value)
