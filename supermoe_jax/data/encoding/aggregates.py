"""Computes point-in-time aggregates of users' histories, an optional input at every snapshot.

Shapes: N events of a block of users, S snapshots of all of them, A aggregates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data.encoding.distinct_counts import distinct_between
from supermoe_jax.data.encoding.factors import Factors
from supermoe_jax.data.encoding.histories import UserBlock, counts_before
from supermoe_jax.data.encoding.numeric import LARGEST, Numeric

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
HOURS = 3  # of a part of the day

# A function that returns whether each event of a block fulfils a condition: bool `[N]`.
BlockCondition = Callable[[UserBlock], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Amount:
  """The place of a numeric field among a block's numbers, and what turns these into raw numbers again."""

  column: int
  encoder: Numeric
  encoding: str  # see `config.Field`

  def __call__(self, block: UserBlock) -> np.ndarray:
    """Returns the raw number of each event: float64 `[N]`, at most the largest of float32; NaN where absent."""
    return np.clip(self.encoder.decode_all(block.numeric[:, self.column], self.encoding), -LARGEST, LARGEST)


@dataclasses.dataclass(frozen=True)
class DistinctField:
  """The columns of a field whose distinct values are counted: of codes, several for lists, or one of numbers."""

  columns: tuple[int, ...]
  numeric: bool = False

  def __call__(self, block: UserBlock) -> np.ndarray:
    """Returns the values of each event as numbers from 0, where 0 is no value: int64 `[N, columns]`."""
    if not self.numeric:
      return block.codes[:, list(self.columns)].astype(np.int64)
    numbers = block.numeric[:, self.columns[0]]
    values = np.unique(numbers, return_inverse=True)[1].reshape(-1) + 1
    return np.where(np.isfinite(numbers), values, 0)[:, None]


@dataclasses.dataclass(frozen=True)
class FactoredField:
  """The columns of codes of a field, several for lists, its factors, and the column of their numbers, if any."""

  columns: tuple[int, ...]
  factors: Factors
  number: int | None = None


@dataclasses.dataclass(frozen=True)
class EventCount:
  """A condition as the config writes it, and the function that evaluates it."""

  where: str
  holds: BlockCondition


@dataclasses.dataclass(frozen=True)
class Aggregator:
  """Calculator of aggregates of a user's events strictly before a snapshot's time τ.

  For each trailing window and the whole history: log1p of the number of events of each source, of distinct event times,
  and of occurrences of the most frequent values of the chosen fields; the mean of each numeric field. For the whole
  history only: log1p hours since the last and the first event, and log1p of the number of distinct values of each
  chosen field. `config.Aggregates` defines the sums, averages, trends, paces, distinct values, conditions, habits
  and factors that a config may add.
  """

  windows_days: tuple[float, ...]
  sources: tuple[str, ...]
  numeric: Mapping[str, int]  # field → its column in `numeric`
  values: Mapping[str, tuple[int, tuple[str, ...]]]  # field → its column in `codes`, its counted values
  amounts: Mapping[str, Amount] = dataclasses.field(default_factory=dict)  # of the fields of the next three
  sums: tuple[str, ...] = ()
  means: tuple[str, ...] = ()
  trends: tuple[str, ...] = ()
  distinct: Mapping[str, DistinctField] = dataclasses.field(default_factory=dict)
  conditions: Mapping[str, EventCount] = dataclasses.field(default_factory=dict)
  paces: bool = False
  habits: bool = False
  factors: Mapping[str, FactoredField] = dataclasses.field(default_factory=dict)

  @property
  def windows(self) -> list[str]:
    """Returns the names of the windows; the last is the whole history."""
    return [*(f"{d:g}d" for d in self.windows_days), "all"]

  @property
  def names(self) -> list[str]:
    """Returns the names of the A aggregates."""
    windows = self.windows
    names = [f"events {s} {w}" for w in windows for s in self.sources] + [f"moments {w}" for w in windows]
    names += [f"mean {n} {w}" for w in windows for n in self.numeric]
    for field, (_, values) in self.values.items():
      names += [f"{field} {v} {w}" for w in windows for v in values] + [f"distinct {field}"]
    names += [f"sum {n} {w}" for w in windows for n in self.sums]
    names += [f"average {n} {w}" for w in windows for n in self.means]
    names += [f"trend {n} {w}" for w in windows[:-1] for n in self.trends]
    names += [f"pace {n} {w}" for w in windows[:-1] for n in ("moments", *self.sums) if self.paces]
    names += [f"distinct {n} {w}" for n in self.distinct for w in windows]
    names += [f"count {n} {w}" for w in windows for n in self.conditions]
    names += [f"share of {part} {w}" for w in self._habit_windows for part in habit_names()]
    names += [f"factor {n} {i}" for n, of in self.factors.items() for i in range(1, of.factors.size + 1)]
    return [*names, "recency", "tenure"]

  @property
  def _habit_windows(self) -> dict[str, int]:
    """Returns the windows of habits, the longest one and the whole history, and their places among all windows."""
    days = self.windows_days
    longest = [days.index(max(days))] if days else []
    return {self.windows[i]: i for i in (*longest, len(days))} if self.habits else {}

  @property
  def factor_columns(self) -> slice:
    """Returns the columns of the factors among the aggregates."""
    last = len(self.names) - 2  # recency and tenure follow
    return slice(last - sum(of.factors.size for of in self.factors.values()), last)

  def __call__(self, block: UserBlock, user: np.ndarray, time: np.ndarray, n_events: np.ndarray) -> np.ndarray:
    """Returns the aggregates of snapshots, float32 `[S, A]`.

    Args:
      block: the histories of users.
      user: `[S]`, the snapshot's user in the block.
      time: `[S]`, microseconds since 1970 UTC.
      n_events: `[S]`, the number of visible events, at least one.
    """
    first = block.offsets[user]
    # The events of window w of snapshot s are [bounds[w, s], bounds[-1, s]) of the block.
    bounds = np.concatenate([self._starts(block, user, time, n_events), first[None], (first + n_events)[None]])

    n = len(block.time)
    per_source = np.zeros((n + 1, len(self.sources)), np.int64)
    per_source[np.arange(1, n + 1), block.source] = 1
    begins = np.diff(block.time, prepend=0) != 0  # an event at another time than the one before
    begins[block.offsets[:-1]] = True
    moments = _windowed(_count(begins)[bounds][..., None])
    columns = [_flat(np.log1p(_windowed(np.cumsum(per_source, axis=0)[bounds]))), _flat(np.log1p(moments))]
    numeric = block.numeric[:, list(self.numeric.values())]
    present = np.isfinite(numeric)
    total = _sums_before(block, np.where(present, numeric, 0.0), bounds, first)
    columns.append(_flat(_windowed(total) / np.maximum(_windowed(_counts(present)[bounds]), 1)))
    for column, values in self.values.values():
      codes = block.codes[:, column]
      columns.append(_flat(np.log1p(_windowed(counts_before(codes, len(values), bounds)))))
      new = np.zeros(n, bool)  # the user's first event with this value
      new[np.unique(block.owner * (int(codes.max(initial=0)) + 1) + codes, return_index=True)[1]] = True
      distinct = _count(new & (codes > 0))
      columns.append(np.log1p(distinct[bounds[-1]] - distinct[first])[:, None])
    totals = moments
    if self.amounts:
      of_amounts, sums = self._of_amounts(block, user, time, n_events, bounds)
      columns, totals = columns + of_amounts, np.concatenate([totals, sums], axis=2)
    if self.paces:
      columns.append(self._paces(totals, (time - block.time[first]) / MICROSECONDS_PER_DAY))
    for field in self.distinct.values():
      columns.append(np.log1p(distinct_between(field(block), block.owner, bounds[:-1], bounds[-1])).T)
    if self.conditions:
      fulfilled = np.stack([condition.holds(block) for condition in self.conditions.values()], axis=1)
      columns.append(_flat(np.log1p(_windowed(_counts(fulfilled)[bounds]))))
    if self.habits:
      parts = _counts(begins[:, None] & _habit_parts(block.time))
      for i in self._habit_windows.values():
        columns.append((parts[bounds[-1]] - parts[bounds[i]]) / np.maximum(moments[:, i], 1))
    for of in self.factors.values():
      number = None if of.number is None else block.numeric[:, of.number]
      added = of.factors.added(block.codes[:, list(of.columns)], block.owner, number)
      columns.append(of.factors.of_sums(_sums_before(block, added, bounds[-1], first)))
    hour = MICROSECONDS_PER_DAY / 24
    columns.append(np.log1p((time - block.time[bounds[-1] - 1]) / hour)[:, None])
    columns.append(np.log1p((time - block.time[first]) / hour)[:, None])
    return np.concatenate(columns, axis=1).astype(np.float32)

  def _starts(
    self, block: UserBlock, user: np.ndarray, time: np.ndarray, n_events: np.ndarray, times: int = 1
  ) -> np.ndarray:
    """Returns the first event in the block of each window, `times` as long as it is: int64 `[windows, S]`."""
    lengths = [times * int(d * MICROSECONDS_PER_DAY) for d in self.windows_days]
    starts = [block.offsets[user] + np.minimum(block.before(user, time - length), n_events) for length in lengths]
    return np.stack(starts) if starts else np.zeros((0, len(time)), np.int64)

  def _of_amounts(
    self, block: UserBlock, user: np.ndarray, time: np.ndarray, n_events: np.ndarray, bounds: np.ndarray
  ) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the columns of the sums, averages and trends of raw numbers, and the sums `[S, windows + 1, sums]`."""
    first, place = bounds[-2], {name: i for i, name in enumerate(self.amounts)}
    raw = np.stack([amount(block) for amount in self.amounts.values()], axis=1)
    present = np.isfinite(raw)
    filled = np.where(present, raw, 0.0)
    before = _sums_before(block, filled, bounds, first)
    total = _windowed(before)
    average = total / np.maximum(_windowed(_counts(present)[bounds]), 1)
    sums = total[..., [place[n] for n in self.sums]]
    columns = [
      _flat(_signed_log(sums)),
      _flat(_signed_log(average[..., [place[n] for n in self.means]])),
    ]
    if self.trends:
      chosen = [place[n] for n in self.trends]
      earlier = _sums_before(block, filled, self._starts(block, user, time, n_events, times=2), first)
      former = np.swapaxes(before[:-2] - earlier, 0, 1)
      columns.append(_flat(_signed_log(total[:, :-1, chosen]) - _signed_log(former[..., chosen])))
    return columns, sums

  def _paces(self, totals: np.ndarray, tenure: np.ndarray) -> np.ndarray:
    """Returns the columns of the paces, from `totals [S, windows + 1, X]` and the `tenure [S]` in days."""
    share = np.array(self.windows_days) / np.maximum(tenure, 1e-9)[:, None]
    usual = totals[:, -1:] * np.minimum(share, 1.0)[..., None]
    return _flat(_signed_log(totals[:, :-1]) - _signed_log(usual))

  def to_json(self) -> dict[str, Any]:
    """Returns the settings as values of JSON, for `from_json`; of the factors only the columns of their fields."""
    saved = dataclasses.asdict(dataclasses.replace(self, conditions={}, factors={}))
    saved["conditions"] = {name: condition.where for name, condition in self.conditions.items()}
    saved["factors"] = {name: of.columns for name, of in self.factors.items()}
    saved["factor_numbers"] = {name: of.number for name, of in self.factors.items()}
    return saved

  @classmethod
  def from_json(
    cls, saved: Mapping[str, Any], bind: Callable[[str, str], BlockCondition], fitted: Mapping[str, Factors]
  ) -> Aggregator:
    """Returns the aggregator that `to_json` saved; exports of an earlier version lack the settings added later.

    Args:
      saved: the values of JSON.
      bind: returns the function that evaluates a condition, from its name and its text.
      fitted: the factors by field.
    """
    return cls(
      tuple(saved["windows_days"]),
      tuple(saved["sources"]),
      saved["numeric"],
      {n: (column, tuple(counted)) for n, (column, counted) in saved["values"].items()},
      {n: Amount(**{**of, "encoder": Numeric(**of["encoder"])}) for n, of in saved.get("amounts", {}).items()},
      tuple(saved.get("sums", ())),
      tuple(saved.get("means", ())),
      tuple(saved.get("trends", ())),
      {n: DistinctField(tuple(of["columns"]), of["numeric"]) for n, of in saved.get("distinct", {}).items()},
      {n: EventCount(where, bind(n, where)) for n, where in saved.get("conditions", {}).items()},
      saved.get("paces", False),
      saved.get("habits", False),
      {
        n: FactoredField(tuple(columns), fitted[n], saved.get("factor_numbers", {}).get(n))
        for n, columns in saved.get("factors", {}).items()
      },
    )


def habit_names() -> list[str]:
  """Returns the names of the parts of the week and of the day whose shares are habits."""
  return [*WEEKDAYS, *(f"{start:02d}-{start + HOURS:02d}h" for start in range(0, 24, HOURS))]


def _habit_parts(time: np.ndarray) -> np.ndarray:
  """Returns whether each time, in microseconds, lies in each part of `habit_names`: `[N]` → bool `[N, 15]`."""
  day, within = np.divmod(time, int(MICROSECONDS_PER_DAY))
  weekday = (day + 3) % len(WEEKDAYS)  # the first of 1970 was a Thursday
  part = within // int(MICROSECONDS_PER_DAY * HOURS / 24)
  return np.concatenate([weekday[:, None] == np.arange(len(WEEKDAYS)), part[:, None] == np.arange(24 // HOURS)], axis=1)


def _windowed(before: np.ndarray) -> np.ndarray:
  """Returns sums over windows, from sums before each bound: `[windows + 1, S, X]` → `[S, windows, X]`."""
  return np.swapaxes(before[-1] - before[:-1], 0, 1)


def _flat(x: np.ndarray) -> np.ndarray:
  return x.reshape(len(x), x.shape[1] * x.shape[2])


def _signed_log(x: np.ndarray) -> np.ndarray:
  return np.copysign(np.log1p(np.abs(x)), x)


def _count(which: np.ndarray) -> np.ndarray:
  """Returns the number of true values before each position: bool `[N]` → int64 `[N + 1]`."""
  return np.append(0, np.cumsum(which))


def _counts(which: np.ndarray) -> np.ndarray:
  """Returns the number of true values before each position, by column: bool `[N, X]` → int64 `[N + 1, X]`."""
  return np.concatenate([np.zeros((1, which.shape[1]), np.int64), np.cumsum(which, axis=0)])


def _sums_before(block: UserBlock, x: np.ndarray, bounds: np.ndarray, first: np.ndarray) -> np.ndarray:
  """Returns the sums of a user's rows of `x [N, X]` before each bound: float64 `[…, S, X]`.

  The sums start at 0 for each user, so that a huge number of one user causes no rounding for another.
  """
  sums = np.zeros((len(x) + 1, x.shape[1]))
  if x.shape[1]:
    x = x.astype(np.float64, copy=False)
    for start, stop in zip(block.offsets[:-1].tolist(), block.offsets[1:].tolist()):
      # np.cumsum is the same behind a wrapper, which takes longer than the sums of one user.
      np.add.accumulate(x[start:stop], axis=0, out=sums[start + 1 : stop + 1])
  return np.where((bounds > first)[..., None], sums[bounds], 0.0)
