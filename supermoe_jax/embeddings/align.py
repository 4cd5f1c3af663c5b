"""Aligns the embeddings of a retrained model with the previous model's embeddings, and measures how far they moved.

A retrained model places users in a space of its own. An orthogonal map (Procrustes; Schönemann 1966,
doi 10.1007/BF02289451) turns the new space onto the previous one. The map keeps lengths and products, and so
neighbours. It is fitted on one half of the users that both versions hold, and judged on the other half. The map that
was judged is the map that is applied.

If the widths differ, the narrower vectors get zeros at their end: the map is square and loses nothing. If the new
vectors are wider, their first numbers stand for the old space.

Shapes: n users, D the larger of both widths.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from supermoe_jax import atomic_files
from supermoe_jax.embeddings import embedding_files, part_files, selection
from supermoe_jax.embeddings.exact_neighbors import ExactSearch, VectorSpace, unit_vectors
from supermoe_jax.embeddings.views import views_text
from supermoe_jax.errors import ConfigError, DataError
from supermoe_jax.progress import ProgressBar

# Fewest users that both versions must hold: fewer show nothing about the map from one to the other.
LEAST = 20
# Most shared users to compare; of more, a sample of this size is drawn.
MOST = 100_000
# Number of users whose neighbours are compared, and number of neighbours of each.
ASKED, NEAREST = 1000, 10
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class DriftError(DataError):
  """Error of embeddings that moved further than allowed."""


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Vectors of the users that both versions hold, one pair a user.

  Attributes:
    matched_by: how pairs were made, in words: by user and time, or by user alone where too few users share a time.
    shared: number of users that both versions hold.
    only_new: number of users that only the new version holds.
    only_old: number of users that only the old version holds.
    new: float32 `[n, D]`.
    old: float32 `[n, D]`.
    fitted: bool `[n]`, true for the half that the map is fitted on.
  """

  matched_by: str
  shared: int
  only_new: int
  only_old: int
  new: np.ndarray
  old: np.ndarray
  fitted: np.ndarray


def align_embeddings(
  new: pathlib.Path, old: pathlib.Path, out: pathlib.Path, *, max_drift: float, overwrite: bool = False, seed: int = 0
) -> dict[str, Any]:
  """Writes the embeddings of `new`, turned into the space of `old`, and returns their manifest.

  Vectors are read and written part by part. Memory holds the ids of all users and the vectors of up to `MOST` users.

  Args:
    new: directory of embeddings.
    old: directory of the previous embeddings.
    out: directory to write.
    max_drift: the largest `drift` of `measure_alignment` that is accepted.
    overwrite: whether to replace embeddings in `out`.
    seed: seed of the halves and of samples.

  Raises:
    ConfigError: `out` is `new` or `old`, `max_drift` is out of range, or a directory has views.
    DriftError: the embeddings moved further than `max_drift`; nothing is written.
    DataError: a directory is damaged, the two share too few users, or `out` cannot be replaced or written.
  """
  if out.resolve() in (new.resolve(), old.resolve()):
    raise ConfigError(f"--out {out} is one of the directories to read; name another directory.")
  if not 0 <= max_drift <= 2:
    raise ConfigError(f"--max-drift={max_drift:g} must lie in [0, 2].")
  atomic_files.check_replaceable(out, embedding_files.KIND, part_files.NAMES)
  if out.exists() and any(out.iterdir()) and not overwrite:
    raise DataError(f"{out} holds embeddings and is not overwritten; name another --out, or add --overwrite.")
  manifest, before = (embedding_files.read_embedding_manifest(path) for path in (new, old))
  for path, found in ((new, manifest), (old, before)):
    if "views" in found:
      raise ConfigError(
        f"{path} has views ({views_text(found)}), and turning whole vectors would mix their numbers; align embeddings "
        "that were written without --views."
      )
  pairs = shared_users(new, old, seed)
  turn = procrustes(pairs.new[pairs.fitted], pairs.old[pairs.fitted])
  drift = measure_alignment(pairs, turn, seed)
  if drift["drift"] > max_drift:
    raise DriftError(
      f"{new} moved by {drift['drift']:.3f} from {old} (1 − mean cosine around the mean, after the alignment, on "
      f"{drift['users']:,} users that it was not fitted on), more than --max-drift={max_drift:g}; nothing was written. "
      "If both have the same users and tasks, look for a change in the data or the config before you raise it."
    )
  manifest |= {
    "width": len(turn),
    "aligned_to": {
      **{key: before.get(key) for key in ("run", "step", "config_hash", "data_hash", "width")},
      "embeddings": str(old),
      "manifest_hash": hashlib.sha256((old / "manifest.json").read_bytes()).hexdigest(),
      "matched_by": pairs.matched_by,
      "shared_users": pairs.shared,
      "users_only_new": pairs.only_new,
      "users_only_old": pairs.only_old,
      "max_drift": max_drift,
      **drift,
    },
  }
  try:
    with atomic_files.replacing_directory(out) as work:
      for file in ProgressBar(embedding_files.part_paths(new), desc="aligning", unit=" parts", mininterval=1):
        _turn_part(file, work / file.name, turn)
      for file in embedding_files.absent_files(new):  # absent users have no vector to turn
        shutil.copy(file, work)
      (work / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
  except OSError as error:
    raise DataError(f"writing embeddings to {out} failed: {error}; nothing was kept.") from error
  return manifest


def shared_users(new: pathlib.Path, old: pathlib.Path, seed: int = 0) -> Pairs:
  """Returns the vectors of users that both directories hold, as of the latest time that both have of a user.

  If fewer than `LEAST` users share a time, each directory gives its own latest vector of a user.

  Raises:
    DataError: a directory is damaged, or the two share fewer than `LEAST` users.
  """
  mine, theirs = selection.select_rows(new), selection.select_rows(old)
  ours = selection.UserFinder(theirs.users).rows(mine.users)
  shared = int(np.sum(ours >= 0))
  only_new, only_old = len(mine) - shared, len(theirs) - shared
  matched_by = "user_id, each one's latest times"
  at_once = selection.select_shared_rows(new, old)
  if len(at_once[0]) >= LEAST:
    mine, theirs = at_once
    ours = selection.UserFinder(theirs.users).rows(mine.users)
    matched_by = "user_id and as_of"
  here = np.flatnonzero(ours >= 0)
  if len(here) < LEAST:
    raise DataError(
      f"{new} and {old} share {shared} users; at least {LEAST} are needed. Name directories of one kind of user."
    )
  rng = np.random.default_rng(seed)
  if len(here) > MOST:
    here = np.sort(rng.choice(here, MOST, replace=False))
  a, b = mine.rows_of(here), theirs.rows_of(ours[here])
  width = max(a.shape[1], b.shape[1])
  fitted = np.zeros(len(here), bool)
  fitted[rng.permutation(len(here))[: len(here) // 2]] = True
  return Pairs(matched_by, shared, only_new, only_old, _wide(a, width), _wide(b, width), fitted)


def _wide(vectors: np.ndarray, width: int) -> np.ndarray:
  return np.pad(vectors, ((0, 0), (0, width - vectors.shape[1])))


def procrustes(new: np.ndarray, old: np.ndarray) -> np.ndarray:
  """Returns the orthogonal float64 `[D, D]` that maximises the sum of cosines of turned `new [n, D]` and `old [n, D]`.

  Only the directions of vectors count, so that every user has the same weight.
  """
  a, b = (unit_vectors(x)[0].astype(np.float64) for x in (new, old))
  u, _, v = np.linalg.svd(a.T @ b)
  return u @ v


def row_cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns the cosine of each row of `a [n, D]` with the same row of `b`: float64 `[n]`, 0 for a row of zeros."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
  return np.divide(np.einsum("nd,nd->n", a, b), lengths, out=np.zeros(len(a)), where=lengths > 0)


def measure_alignment(pairs: Pairs, turn: np.ndarray, seed: int = 0) -> dict[str, Any]:
  """Measures how far the new vectors lie from the old ones, on the half that the map was not fitted on.

  Returns:
    `drift`: 1 − the mean cosine after the alignment, where each version's mean is subtracted from its vectors. The
      mean is subtracted because vectors that all point one way have large cosines, whatever else they hold.
    `users`, `fitted_users`: the sizes of the two halves.
    `neighbours_of`: the number of users whose neighbours are compared.
    `before`, `after`: mean cosine, `centred_cosine` (means subtracted), quantiles, and `neighbours_across`, the Jaccard
      index of the 10 old vectors nearest to a user's old vector and the 10 nearest to its new vector.
    `neighbours_kept`: the Jaccard index of a user's 10 nearest in the new version and in the old; no turn changes it.
  """
  held = ~pairs.fitted
  new, old = pairs.new[held], pairs.old[held]
  turned = (new.astype(np.float64) @ turn).astype(np.float32)
  asked = np.sort(np.random.default_rng(seed).permutation(len(new))[:ASKED])
  there = ExactSearch(VectorSpace.of(old))
  nearest = there.search(old[asked], NEAREST, asked).row
  out: dict[str, Any] = {}
  for name, vectors in (("before", new), ("after", turned)):
    found = row_cosines(vectors, old)
    across = there.search(vectors[asked], NEAREST, asked).row
    out[name] = {
      "mean_cosine": float(found.mean()),
      "centred_cosine": float(row_cosines(vectors - vectors.mean(axis=0), old - old.mean(axis=0)).mean()),
      "quantiles": {f"{q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(found, QUANTILES))},
      "neighbours_across": jaccard(across, nearest),
    }
  kept = jaccard(ExactSearch(VectorSpace.of(new)).search(new[asked], NEAREST, asked).row, nearest)
  return {
    "drift": 1 - out["after"]["centred_cosine"],
    "users": len(new),
    "fitted_users": int(pairs.fitted.sum()),
    "neighbours_of": len(asked),
    "neighbours_kept": kept,
    **out,
  }


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the mean Jaccard index of the rows of `a [n, k]` and `b [n, k]`, where -1 stands for no entry."""
  both = np.array([np.isin(x[x >= 0], y[y >= 0]).sum() for x, y in zip(a, b)])
  either = (a >= 0).sum(axis=1) + (b >= 0).sum(axis=1) - both
  return float(np.mean(both / np.maximum(either, 1)))


def _turn_part(file: pathlib.Path, out: pathlib.Path, turn: np.ndarray) -> None:
  """Writes a part with its vectors turned; all other columns and the type of numbers stay."""
  table = embedding_files.read_embedding_file(file)
  at = table.schema.get_field_index("embedding")
  field = table.schema.field(at)
  vectors = _wide(embedding_files.embedding_vectors(table), len(turn)).astype(np.float64) @ turn
  kind = field.type.value_type
  number = np.float16 if pa.types.is_float16(kind) else np.float32
  values = pa.array(vectors.astype(number).reshape(-1), kind)
  column = pa.FixedSizeListArray.from_arrays(values, len(turn))
  table = table.set_column(at, pa.field("embedding", column.type, metadata=field.metadata), column)
  pq.write_table(table, out)


def alignment_summary(manifest: dict[str, Any]) -> list[str]:
  """Returns lines that summarise an alignment."""
  to = manifest["aligned_to"]
  lines = [
    f"{to['shared_users']:,} users in both versions, matched by {to['matched_by']}; {to['users_only_new']:,} only in "
    f"the new one, {to['users_only_old']:,} only in the old one",
    f"fitted on {to['fitted_users']:,} of them, measured on {to['users']:,} others:",
  ]
  for name in ("before", "after"):
    it = to[name]
    low, middle, high = (it["quantiles"][q] for q in ("0.05", "0.5", "0.95"))
    lines.append(
      f"  {name:<6}  mean cosine {it['mean_cosine']:.4f} (5 %: {low:.4f}, median: {middle:.4f}, 95 %: {high:.4f}), "
      f"around the mean {it['centred_cosine']:.4f}; new vectors find {it['neighbours_across']:.1%} of old neighbours"
    )
  lines.append(
    f"  neighbours kept (Jaccard of the {NEAREST} nearest, {to['neighbours_of']:,} users): {to['neighbours_kept']:.1%}"
  )
  lines.append(f"drift {to['drift']:.4f}, at most {to['max_drift']:g} allowed")
  if to["fitted_users"] < manifest["width"]:
    lines.append(
      f"note: the fit has fewer users than a vector has numbers ({manifest['width']}), so it does not determine the map"
    )
  return lines
