"""Reuses earlier embeddings of users whose events have not changed.

A user's vector depends on the events before the requested time, on that time and on the parameters. If time and
parameters are the same, a user is computed again only if the events before the time have changed. The place of a user's
record in the dataset shows whether they may have: 'supermoe append' writes a changed record anew, behind the others.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from supermoe_jax.data.dataset.dataset import Dataset, read_user_rows
from supermoe_jax.data.encoding.splits import user_hash
from supermoe_jax.embeddings import embedding_files, part_files
from supermoe_jax.embeddings.part_files import RowStyle
from supermoe_jax.embeddings.views import views_text
from supermoe_jax.errors import ConfigError, DataError
from supermoe_jax.training.run import Run

# Manifest keys that must be equal for embeddings to be reused, and their names in messages.
SAME = {"step": "the step", "config_hash": "the config", "dtype": "--dtype"}


class ReusedRows(NamedTuple):
  """Rows that a part reuses, and the users left to compute; users are indices in the dataset.

  Attributes:
    table: rows with the columns `part_files.COLUMNS`.
    user: int64, the user of each row of `table`.
    absent: rows of users without an event before a time.
    missing: int64, the user of each row of `absent`.
    compute: int64, the users whose rows must be computed.
  """

  table: pa.Table
  user: np.ndarray
  absent: pa.Table
  missing: np.ndarray
  compute: np.ndarray


class EarlierEmbeddings:
  """A set of embeddings of the same parameters and times, written before the dataset's last appends.

  Attributes:
    manifest: its manifest.
    records: number of records that the dataset had then; records at later places were written since.
    grown: whether a vocabulary has grown since.
  """

  def __init__(self, path: pathlib.Path, run: Run, manifest: Mapping[str, Any], style: RowStyle):
    """Opens the directory `path`; `manifest` holds the known entries of the new set's manifest.

    Raises:
      ConfigError: the earlier set has other parameters, or another form.
      DataError: `path` holds no whole set, or a set of another dataset.
    """
    self._path, self._dataset, self._style = path, run.dataset, style
    self.manifest = embedding_files.read_embedding_manifest(path)
    if "aligned_to" in self.manifest:
      raise ConfigError(
        f"--since {path} was turned by 'supermoe align' into the space of {self.manifest['aligned_to']['embeddings']}; "
        "vectors of two spaces do not belong in one table. Name the embeddings before alignment, and align again."
      )
    if "dataset" not in self.manifest:
      raise DataError(
        f"{path} was written by an earlier version, which did not record its dataset; embed without --since once."
      )
    for key, name in SAME.items():
      if self.manifest.get(key) != manifest[key]:
        raise ConfigError(
          f"--since {path}: {name} was {self.manifest.get(key)!r} there and is {manifest[key]!r} now; vectors of "
          "different kinds do not belong in one table. Leave out --since to embed all users."
        )
    if self.manifest.get("views") != manifest.get("views"):
      raise ConfigError(
        f"--since {path}: its views are {views_text(self.manifest)}, and those of this command {views_text(manifest)}; "
        "vectors of different kinds do not belong in one table. Use --views for both or for neither, or leave out "
        "--since to embed all users."
      )
    self.records, self.grown = _news(path, self.manifest["dataset"], run.dataset)
    # Users are ordered by their hashes, both in the earlier files and in the dataset.
    self._parts = _with_firsts(embedding_files.part_paths(path))
    self._absent = _with_firsts(embedding_files.absent_files(path))

  def take(self, start: int, stop: int, times: Sequence[int | None]) -> ReusedRows:
    """Returns the rows to reuse for the dataset's users from `start` to before `stop`, as of `times`."""
    users = read_user_rows(self._dataset.path, start, stop)
    names, places = users["user"].to_pylist(), users["record"].to_numpy()
    index = {name: start + i for i, name in enumerate(names)}
    none = np.zeros((0, self._style.width), np.float32)
    table, user = self._rows(self._parts, part_files.embedding_rows([], none, self._style), index)
    absent, missing = self._rows(self._absent, part_files.absent_rows([], self._style), index)
    known = _row_numbers(user, table, ("as_of", "n_events", "last_event_time"))
    known |= _row_numbers(missing, absent, ("as_of", None, "first_event_time"))
    news = np.arange(start, stop)[places >= self.records]
    compute = news if self.grown else self._changed(news, known, times)
    table, user = _without(table, user, compute)
    absent, missing = _without(absent, missing, compute)
    answered = np.bincount(np.concatenate([user, missing]) - start, minlength=stop - start)
    answered[compute - start] = len(times)
    for i in np.flatnonzero(answered != len(times))[:1].tolist():
      raise DataError(
        f"{self._path} must hold one row of user {names[i]!r} for each time, since this user has no new events, but "
        "does not; embed without --since."
      )
    return ReusedRows(table, user, absent, missing, compute)

  def _rows(
    self, among: tuple[list[pathlib.Path], np.ndarray], none: pa.Table, index: dict[str, int]
  ) -> tuple[pa.Table, np.ndarray]:
    """Returns the earlier rows of the users in `index`, with the schema of `none`, and the user of each row."""
    files, firsts = among
    hashes = [user_hash(name) for name in (next(iter(index)), next(reversed(index)))]
    begin, end = (int(np.searchsorted(firsts, h, side="right")) for h in hashes)
    tables, users = [none], [np.zeros(0, np.int64)]
    for file in files[max(begin - 1, 0) : end]:
      table = embedding_files.read_embedding_file(file, none.column_names)
      user = np.array([index.get(str(u), -1) for u in table["user_id"].to_pylist()], np.int64)
      tables.append(table.filter(user >= 0).cast(none.schema))
      users.append(user[user >= 0])
    return pa.concat_tables(tables), np.concatenate(users)

  def _changed(self, users: np.ndarray, known: set[tuple[int, ...]], times: Sequence[int | None]) -> np.ndarray:
    """Returns the `users` whose events before any of `times` have changed."""
    if not len(users):
      return users
    block = self._dataset.histories(users)
    first, last = block.time[block.offsets[:-1]], block.time[block.offsets[1:] - 1]
    changed = np.zeros(len(users), bool)
    for time in times:
      asked = last + 1 if time is None else np.full(len(users), time)
      n = block.before(np.arange(len(users)), asked)
      event = np.where(n > 0, block.time[np.maximum(block.offsets[:-1] + n - 1, 0)], first)
      facts = zip(users.tolist(), asked.tolist(), n.tolist(), event.tolist())
      changed |= np.array([fact not in known for fact in facts])
    return users[changed]


def _news(path: pathlib.Path, then: Mapping[str, Any], dataset: Dataset) -> tuple[int, bool]:
  """Returns the number of records that the dataset had then, and whether a vocabulary has grown since.

  Raises:
    DataError: 'supermoe append' did not make the dataset from the earlier one.
  """
  if then["digest"] == dataset.manifest["digest"]:
    return dataset.records, False
  appends = dataset.manifest.get("appends", ())
  for i, append in enumerate(appends):
    if append.get("dataset_before") == then["digest"]:
      grown = any(v["added"] for a in appends[i:] for v in a["vocabularies"].values())
      return append["records_before"], grown
  raise DataError(
    f"{path} was made neither from {dataset.path} nor from an earlier state of it before 'supermoe append'; leave out "
    "--since to embed all users."
  )


def _with_firsts(files: Sequence[pathlib.Path]) -> tuple[list[pathlib.Path], np.ndarray]:
  """Returns the files that hold rows, and the hash of each file's first user."""
  found, firsts = [], []
  for file in files:
    with pq.ParquetFile(file) as parquet:
      if parquet.metadata.num_rows:
        row = next(parquet.iter_batches(batch_size=1, columns=["user_id"]))
        found.append(file)
        firsts.append(user_hash(str(row["user_id"][0].as_py())))
  return found, np.array(firsts, "U32")


def _row_numbers(user: np.ndarray, table: pa.Table, columns: Sequence[str | None]) -> set[tuple[int, ...]]:
  """Returns each row's user and integers in `columns`; a column of None gives 0."""
  values = (np.zeros(len(user), np.int64) if c is None else table[c].cast(pa.int64()).to_numpy() for c in columns)
  return set(zip(user.tolist(), *(v.tolist() for v in values)))


def _without(table: pa.Table, user: np.ndarray, users: np.ndarray) -> tuple[pa.Table, np.ndarray]:
  """Returns the rows that belong to none of `users`, and the user of each row."""
  kept = ~np.isin(user, users)
  return table.filter(kept), user[kept]
