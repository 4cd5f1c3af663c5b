"""Defines the three splits, and assigns users to them by hash."""

from __future__ import annotations

import hashlib

from supermoe_jax import config

TRAIN, VALIDATION, TEST = 0, 1, 2
SPLITS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}


def user_split(user: str, split: config.Split) -> int:
  """Assigns a user to TRAIN, VALIDATION or TEST for user labels, by a hash that is the same everywhere.

  With mode `user` all of the user's snapshots belong there.
  """
  share = _user_share(user)
  if share < split.user_test:
    return TEST
  return VALIDATION if share < split.user_test + split.user_validation else TRAIN


def fold_split(user: str, split: config.Split, fold: int, folds: int) -> int:
  """Assigns a user to TRAIN, VALIDATION or TEST in a fold of user labels.

  The validation users are those of `user_split`, in every fold: what is chosen by validation is then never chosen by a
  user who is tested. All other users are dealt into `folds` parts by the same hash. Fold k tests part k and trains on
  the others, so over all folds each of these users is tested once, by a model that was not trained on the user's label.
  """
  share, test = _user_share(user), split.user_test
  if user_split(user, split) == VALIDATION:
    return VALIDATION
  place = (share if share < test else share - split.user_validation) / (1 - split.user_validation)
  return TEST if min(int(place * folds), folds - 1) == fold else TRAIN


def _user_share(user: str) -> float:
  """Returns a number in [0, 1) by the user's hash."""
  return int.from_bytes(hashlib.md5(user.encode()).digest()[:8], "little") / 2**64


def user_split_sql(column: str, split: config.Split) -> str:
  """Returns the SQL of `user_split` of the user in `column`, by the same hash and arithmetic."""
  share = f"md5_number_upper({column})::DOUBLE / {2.0**64!r}::DOUBLE"
  held_out = split.user_test + split.user_validation
  return (
    f"CASE WHEN {share} < {split.user_test!r}::DOUBLE THEN {TEST} "
    f"WHEN {share} < {held_out!r}::DOUBLE THEN {VALIDATION} ELSE {TRAIN} END"
  )


def user_hash(user: str) -> str:
  """Returns the hash that orders users in a dataset, 32 hexadecimal digits; `user_split` uses another hash.

  The order is the same as TensorFlow Datasets gives the keys of a split named `users`.
  """
  return hashlib.md5(b"users" + user.encode()).hexdigest()


def user_hash_sql(column: str) -> str:
  """Returns the SQL of `user_hash` of the user in `column`."""
  return f"md5('users' || {column})"


def training_user_sql(column: str, split: config.Split) -> str:
  """Returns the SQL of whether `user_split` of the user in `column` is TRAIN, by the same hash and arithmetic."""
  return (
    f"md5_number_upper({column})::DOUBLE / {2.0**64!r}::DOUBLE >= {split.user_test + split.user_validation!r}::DOUBLE"
  )
