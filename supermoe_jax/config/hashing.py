"""Fields of a config that hash one column into more rows, or more surely, than one table can."""

from __future__ import annotations

from typing import Any

from supermoe_jax.config.schema import MOST_ROWS
from supermoe_jax.errors import ConfigError


def hash_fields(name: str, size: int, *, hashes: int = 1, **settings: Any) -> dict[str, dict[str, Any]]:
  """The fields of a config that hash one column into `size` buckets, for use in `get_config`.

  More buckets than int32 can number are spread over several fields, each with a table of its own: a value has a code in
  one of them and is absent in the others. With two hashes every value has two rows, which add up: values that share the
  one almost never share the other, so that far fewer rows tell them apart.

  Args:
    name: of the first field; the others add to it.
    size: buckets of each hash; rounded up so that the parts are equally large.
    hashes: 1, or 2.
    settings: of `Field`, such as `column`, which is `name` by default.

  Raises:
    ConfigError: `size` or `hashes` cannot be.

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
