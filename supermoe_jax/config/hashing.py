"""Writes config fields that hash one column into more buckets, or with fewer collisions, than one table allows."""

from __future__ import annotations

from typing import Any

from supermoe_jax.config.schema import MOST_ROWS
from supermoe_jax.errors import ConfigError


def hash_fields(name: str, size: int, *, hashes: int = 1, **settings: Any) -> dict[str, dict[str, Any]]:
  """Returns config fields that hash one column into `size` buckets, for use in `get_config`.

  A table numbers its rows with int32. More buckets are spread over several fields, each with its own table: a value has
  a code in one of these fields and is absent in the others. With two hashes every value has two rows, whose embeddings
  add up. Two values that share one row almost never share the other, so far fewer rows suffice to tell values apart.

  Args:
    name: the name of the first field; the other fields' names add a suffix to it.
    size: the number of buckets of each hash; rounded up so that all parts are equally large.
    hashes: 1 or 2.
    settings: settings of `Field`, such as `column`, which is `name` by default.

  Raises:
    ConfigError: `size` is less than 1, or `hashes` is neither 1 nor 2.

  Source: compositional embeddings, arXiv 1909.02107; two hashes, arXiv 1709.03933.
  """
  if size < 1 or hashes not in (1, 2):
    raise ConfigError(f"hash_fields({name!r}, size={size}, hashes={hashes}): size at least 1, hashes 1 or 2.")
  parts = -(-size // MOST_ROWS)
  common = {"column": name, **settings, "kind": "hash", "size": -(-size // parts), "parts": parts}
  out = {}
  for half, suffix in (("lower", ""), ("upper", "_again"))[:hashes]:
    for part in range(parts):
      out[f"{name}{suffix}" + (f"_{part}" if part else "")] = {**common, "part": part, "half": half}
  return out
