"""Turns the values that a user has had into a few numbers: the factors of the matrix of users and values.

The matrix holds log(1 + n) · w for n events of a user with a value, its rows scaled to unit length; w is the value's
weight, larger for a value that few users have. The factors are its first right singular vectors. So users that have had
similar values have similar numbers, also where no two of their values are the same.

With the numbers of events, such as ratings, the matrix has a second half: log 2 · w · (x − u), where x is the
standardised number of the user's first event with the value, and u the usual number there; 0 if that event has no
number. A row r of it is divided by √(1 + |r|²), so that few numbers weigh little, and weighs `NUMBERS_WEIGHT` as much
as one of the first half.

Source: latent semantic analysis, https://doi.org/10.1002/(SICI)1097-4571(199009)41:6%3C391::AID-ASI1%3E3.0.CO;2-9; as a
view of users in the RecSys Challenge 2025, https://github.com/antklen/recsys_challenge_2025.

Shapes: N events with m values each, S snapshots, V codes, R factors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import urllib.parse
from collections.abc import Iterable, Mapping

import numpy as np

from supermoe_jax.batch import ABSENT

LEAST_WEIGHT = 0.05  # of a value that every user has
NUMBERS_WEIGHT = 0.6  # of the values 0.3, 0.6 and 1 the best for the attributes of MovieLens 1M's users
USUAL_PRIOR = 3.0  # numbers of average size that are added to those of a value, so that a rare one is near the average
LEAST_SINGULAR = 1e-6  # singular value of a factor, as a share of the largest
DECIMALS = 6


@dataclasses.dataclass(frozen=True, eq=False)
class Factors:
  """The factors of a field.

  Attributes:
    weight: float32 `[V]`, the weight of each code, 0 for absent, unknown and codes added after fitting.
    direction: float32 `[V, R]`, the right singular vectors.
    usual: float32 `[V]`, the usual standardised number at each code; None for factors without numbers.
    above: float32 `[V, R]`, those of the second half, times `NUMBERS_WEIGHT`; None for factors without numbers.
  """

  weight: np.ndarray
  direction: np.ndarray
  usual: np.ndarray | None = None
  above: np.ndarray | None = None

  @property
  def size(self) -> int:
    """Returns R."""
    return self.direction.shape[1]

  @property
  def sums(self) -> int:
    """Returns the number of sums over events from which the factors follow."""
    return (self.size + 1) * (1 if self.usual is None else 2)

  def added(self, codes: np.ndarray, owner: np.ndarray, number: np.ndarray | None = None) -> np.ndarray:
    """Returns what each event adds to its user's factors before scaling and, last, to the square of the row's length.

    An event with a value that the user has had k times adds log(2 + k) − log(1 + k) of that value, and the first one
    adds how far its number is above the usual one. So factors at every snapshot follow from sums over events; see
    `of_sums`.

    Args:
      codes: `[N, m]`, the codes of events.
      owner: `[N]`, the user of each event; users are in order.
      number: `[N]`, the standardised numbers of events, NaN where there is none, for factors with numbers.

    Returns: float64 `[N, R + 1]`; with numbers `[N, 2R + 2]`, where the second half is that of the numbers.
    """
    many = codes.shape[1]
    code = codes.reshape(-1).astype(np.int64)
    code[code >= len(self.weight)] = ABSENT  # added after fitting
    weight = self.weight[code].astype(np.float64)
    before = _times_before(code + np.repeat(owner, many) * len(self.weight))
    gained = weight * np.log1p(1 / (1 + before))
    square = np.square(weight) * (np.square(np.log1p(before + 1)) - np.square(np.log1p(before)))
    out = np.zeros((len(codes), self.sums))
    self._fill(out[:, : self.size + 1], gained, square, code.reshape(-1, many), self.direction)
    if self.usual is not None and self.above is not None:
      assert number is not None
      above = np.nan_to_num(np.repeat(number.astype(np.float64), many) - self.usual[code])
      entry = np.where(before == 0, weight * np.log(2) * above, 0.0)
      self._fill(out[:, self.size + 1 :], entry, np.square(entry), code.reshape(-1, many), self.above)
    return out

  def _fill(
    self, out: np.ndarray, entry: np.ndarray, square: np.ndarray, code: np.ndarray, direction: np.ndarray
  ) -> None:
    """Fills `out [N, R + 1]` from `entry` and `square`, `[N · m]`, of the codes `[N, m]`."""
    entry = entry.reshape(code.shape)
    for column in range(code.shape[1]):  # one value of a list after the other: only one [N, R] more is in memory
      out[:, :-1] += entry[:, column, None] * direction[code[:, column]]
    out[:, -1] = square.reshape(code.shape).sum(axis=1)

  def of_sums(self, sums: np.ndarray) -> np.ndarray:
    """Returns the factors of snapshots from their sums of `added`: float64 `[S, R]`. Those of no value are 0."""
    square = sums[:, self.size, None]
    found = sums[:, : self.size] / np.sqrt(np.where(square > 0, square, 1.0))
    if self.usual is not None:
      found = found + sums[:, self.size + 1 : -1] / np.sqrt(1.0 + np.maximum(sums[:, -1:], 0.0))
    return found

  @property
  def sha256(self) -> str:
    """Returns a hash of the numbers."""
    parts = (self.weight, self.direction, self.usual, self.above)
    return hashlib.sha256(b"".join(p.tobytes() for p in parts if p is not None)).hexdigest()


def save_factors(path: pathlib.Path, found: Mapping[str, Factors]) -> None:
  """Writes the factors of fields into the directory `path`, from which `load_factors` reads them."""
  for name, of in found.items():
    np.save(_file(path, name), np.column_stack([of.weight, of.direction]), allow_pickle=False)
    if of.usual is not None and of.above is not None:
      np.save(_file(path, name, ".numbers"), np.column_stack([of.usual, of.above]), allow_pickle=False)


def load_factors(path: pathlib.Path, names: Iterable[str]) -> dict[str, Factors]:
  """Reads the factors of the named fields that `save_factors` wrote."""
  out = {}
  for name in names:
    files = [_file(path, name)]
    if (numbers := _file(path, name, ".numbers")).is_file():
      files.append(numbers)
    tables = [np.load(file, allow_pickle=False) for file in files]
    out[name] = Factors(*(np.ascontiguousarray(part) for t in tables for part in (t[:, 0], t[:, 1:])))
  return out


def _file(path: pathlib.Path, name: str, part: str = "") -> pathlib.Path:
  return path / f"factors-{urllib.parse.quote(name, safe='')}{part}.npy"


def fit_factors(
  user: np.ndarray,
  code: np.ndarray,
  count: np.ndarray,
  codes: int,
  size: int,
  number: np.ndarray | None = None,
) -> Factors:
  """Fits the factors of a field.

  Args:
    user: int64 `[n]`, the user of each entry of the matrix.
    code: int64 `[n]`, its code, that of a known value; no pair of user and code occurs twice.
    count: int64 `[n]`, how often the user had the value.
    codes: V.
    size: the largest number of factors; there are fewer where users or values are.
    number: `[n]`, the standardised number of the first event of each entry, NaN without one, for factors with numbers.
  """
  import threadpoolctl  # these take long to import, and reading factors needs none of them
  from scipy import sparse
  from sklearn.utils.extmath import randomized_svd

  row = np.unique(user, return_inverse=True)[1].reshape(-1)
  users = int(row.max()) + 1
  having = np.bincount(code, minlength=codes)
  weight = np.where(having > 0, np.maximum(np.log(users / (1 + having)), LEAST_WEIGHT), 0.0)
  entry = np.log1p(count) * weight[code]
  length = np.sqrt(np.bincount(row, entry**2, users))
  held = np.flatnonzero(having)
  column = np.searchsorted(held, code)
  shape = users, len(held)
  matrix = sparse.csr_matrix((entry / length[row], (row, column)), shape=shape)
  usual = np.zeros(codes)
  if number is not None:
    known = np.isfinite(number)
    total = np.bincount(code[known], number[known], codes)
    usual = total / (np.bincount(code[known], minlength=codes) + USUAL_PRIOR)
    usual = np.round(usual, DECIMALS).astype(np.float32).astype(np.float64)
    beyond = np.log(2) * weight[code] * np.where(known, number - usual[code], 0.0)
    scale = NUMBERS_WEIGHT / np.sqrt(1.0 + np.bincount(row, beyond**2, users))
    matrix = sparse.hstack([matrix, sparse.csr_matrix((beyond * scale[row], (row, column)), shape=shape)]).tocsr()
  with threadpoolctl.threadpool_limits(1):
    _, singular, found = randomized_svd(matrix, min(size, *matrix.shape), random_state=0)
  found = found[singular > LEAST_SINGULAR * singular[0]]  # of the others no direction is better than another

  def of_values(part: np.ndarray) -> np.ndarray:
    """Returns the directions `[R, values]` by code; rounded, since the last digits depend on the machine."""
    direction = np.zeros((codes, len(found)), np.float32)
    direction[held] = np.round(part.T, DECIMALS)
    return direction

  rounded = np.round(weight, DECIMALS).astype(np.float32)
  direction = of_values(found[:, : len(held)])
  if number is None:
    return Factors(rounded, direction)
  return Factors(rounded, direction, usual.astype(np.float32), of_values(NUMBERS_WEIGHT * found[:, len(held) :]))


def _times_before(value: np.ndarray) -> np.ndarray:
  """Returns how often each entry's value occurred before it: int64 `[N]`."""
  order = np.argsort(value, kind="stable")
  ordered = value[order]
  first = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
  out = np.empty(len(value), np.int64)
  out[order] = np.arange(len(value)) - np.repeat(first, np.diff(np.append(first, len(value))))
  return out
