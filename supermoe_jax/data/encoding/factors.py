"""Turns the values that a user has had into a few numbers: the factors of the matrix of users and values.

The matrix holds log(1 + n) · w for n events of a user with a value, its rows scaled to unit length; w is the value's
weight, larger for a value that few users have. The factors are its first right singular vectors. So users that have had
similar values have similar numbers, also where no two of their values are the same.

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
LEAST_SINGULAR = 1e-6  # singular value of a factor, as a share of the largest
DECIMALS = 6


@dataclasses.dataclass(frozen=True, eq=False)
class Factors:
  """The factors of a field.

  Attributes:
    weight: float32 `[V]`, the weight of each code, 0 for absent, unknown and codes added after fitting.
    direction: float32 `[V, R]`, the right singular vectors.
  """

  weight: np.ndarray
  direction: np.ndarray

  @property
  def size(self) -> int:
    """Returns R."""
    return self.direction.shape[1]

  def added(self, codes: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Returns what each event adds to its user's factors before scaling and, last, to the square of the row's length.

    An event with a value that the user has had k times adds log(2 + k) − log(1 + k) of that value. So factors at every
    snapshot follow from sums over events; see `of_sums`.

    Args:
      codes: `[N, m]`, the codes of events.
      owner: `[N]`, the user of each event; users are in order.

    Returns: float64 `[N, R + 1]`.
    """
    many = codes.shape[1]
    code = codes.reshape(-1).astype(np.int64)
    code[code >= len(self.weight)] = ABSENT  # added after fitting
    weight = self.weight[code].astype(np.float64)
    before = _times_before(code + np.repeat(owner, many) * len(self.weight))
    gained = weight * np.log1p(1 / (1 + before))
    square = np.square(weight) * (np.square(np.log1p(before + 1)) - np.square(np.log1p(before)))
    out = np.zeros((len(codes), self.size + 1))
    for column in range(many):  # one value of a list after the other, so that only one [N, R] more is in memory
      out[:, :-1] += gained[column::many, None] * self.direction[code[column::many]]
    out[:, -1] = square.reshape(-1, many).sum(axis=1)
    return out

  @property
  def sha256(self) -> str:
    """Returns a hash of the numbers."""
    return hashlib.sha256(self.weight.tobytes() + self.direction.tobytes()).hexdigest()


def save_factors(path: pathlib.Path, found: Mapping[str, Factors]) -> None:
  """Writes the factors of fields into the directory `path`, from which `load_factors` reads them."""
  for name, of in found.items():
    np.save(_file(path, name), np.column_stack([of.weight, of.direction]), allow_pickle=False)


def load_factors(path: pathlib.Path, names: Iterable[str]) -> dict[str, Factors]:
  """Reads the factors of the named fields that `save_factors` wrote."""
  tables = {name: np.load(_file(path, name), allow_pickle=False) for name in names}
  return {n: Factors(np.ascontiguousarray(t[:, 0]), np.ascontiguousarray(t[:, 1:])) for n, t in tables.items()}


def _file(path: pathlib.Path, name: str) -> pathlib.Path:
  return path / f"factors-{urllib.parse.quote(name, safe='')}.npy"


def of_sums(sums: np.ndarray) -> np.ndarray:
  """Returns the factors of snapshots from their sums of `Factors.added`: `[S, R + 1]` → float64 `[S, R]`.

  The factors of a user without a value are 0.
  """
  square = sums[:, -1:]
  return sums[:, :-1] / np.sqrt(np.where(square > 0, square, 1.0))


def fit_factors(user: np.ndarray, code: np.ndarray, count: np.ndarray, codes: int, size: int) -> Factors:
  """Fits the factors of a field.

  Args:
    user: int64 `[n]`, the user of each entry of the matrix.
    code: int64 `[n]`, its code, that of a known value; no pair of user and code occurs twice.
    count: int64 `[n]`, how often the user had the value.
    codes: V.
    size: the largest number of factors; there are fewer where users or values are.
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
  matrix = sparse.csr_matrix((entry / length[row], (row, column)), shape=(users, len(held)))
  with threadpoolctl.threadpool_limits(1):
    _, singular, found = randomized_svd(matrix, min(size, users, len(held)), random_state=0)
  found = found[singular > LEAST_SINGULAR * singular[0]]  # of the others no direction is better than another
  direction = np.zeros((codes, len(found)), np.float32)
  # Rounded, since the last digits depend on the machine, and the hash of the encoding must not.
  direction[held] = np.round(found.T, DECIMALS)
  return Factors(np.round(weight, DECIMALS).astype(np.float32), direction)


def _times_before(value: np.ndarray) -> np.ndarray:
  """Returns how often each entry's value occurred before it: int64 `[N]`."""
  order = np.argsort(value, kind="stable")
  ordered = value[order]
  first = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
  out = np.empty(len(value), np.int64)
  out[order] = np.arange(len(value)) - np.repeat(first, np.diff(np.append(first, len(value))))
  return out
