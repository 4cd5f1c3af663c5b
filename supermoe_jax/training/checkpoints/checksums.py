"""Computes checksums, which show whether arrays or JSON values are still what was written.

The checksum of an array is a sum over its elements, modulo 2³², of a hash of the element's bits and its position. It is
computed where the array lies, whatever the mesh, so that it costs one pass over the device's memory and no traffic. One
changed bit always changes it.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from supermoe_jax.training.checkpoints import reshard_tables


def array_checksums(tree: Any) -> dict[str, int]:
  """Returns the checksum of every array of a tree, by its path."""
  found, _ = jax.tree_util.tree_flatten_with_path(_checksums(tree))
  values = jax.device_get([value for _, value in found])
  return {"/".join(reshard_tables.path(keys)): int(value) for (keys, _), value in zip(found, values)}


def json_checksum(words: Any) -> int:
  """Returns the checksum of a value that JSON can hold."""
  return zlib.crc32(json.dumps(words, sort_keys=True).encode())


@jax.jit
def _checksums(tree: Any) -> Any:
  return jax.tree.map(_checksum, tree)


def _checksum(x: jax.Array) -> jax.Array:
  bits = _bits(x)
  place = jnp.zeros(bits.shape, jnp.uint32)
  stride = 1
  for i in reversed(range(bits.ndim)):
    place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, i) * jnp.uint32(stride % 2**32)
    stride *= bits.shape[i]
  return jnp.sum(_mixed(bits ^ _mixed(place + jnp.uint32(0x9E3779B9))), dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
  """Returns the bits of `x` as uint32; an element of 8 bytes becomes two, in a last dimension of their own."""
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mixed(h: jax.Array) -> jax.Array:
  """Applies the finalizer of MurmurHash3: it is one to one, and every input bit affects every output bit."""
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return h ^ (h >> 16)
