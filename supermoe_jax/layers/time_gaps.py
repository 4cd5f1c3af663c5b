"""Encodes time gaps on a logarithmic scale, piecewise linearly."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Unit = Literal["seconds", "hours"]

# A gap is encoded as log(1 + gap / unit). So gaps well below the unit look alike: sessions of clicks need seconds.
_PER_HOUR: dict[Unit, float] = {"seconds": 3600.0, "hours": 1.0}

# Gaps, in hours, at which the encodings bend. The hours' knots are those of version 0.1.0.
EMBEDDING_KNOTS: dict[Unit, tuple[float, ...]] = {
  "seconds": (1 / 360, 0.05, 1.0, 24.0, 72.0, 168.0, 336.0, 672.0),
  "hours": (0.05, 1.0, 24.0, 72.0, 168.0, 336.0, 672.0),
}
ATTENTION_KNOTS: dict[Unit, tuple[float, ...]] = {  # each costs a pass over all pairs of positions
  "seconds": (0.0, 1.0, 24.0, 672.0),
  "hours": (0.0, 24.0, 672.0),
}


def log_gap(hours: jax.Array, unit: Unit) -> jax.Array:
  """Returns `log(1 + gap / unit)` of gaps in hours."""
  return jnp.log1p(hours * _PER_HOUR[unit])


def log_knots(hours: tuple[float, ...], unit: Unit) -> np.ndarray:
  """Returns `log_gap` of knots in hours, on the host."""
  return np.log1p(np.array(hours) * _PER_HOUR[unit])


def bends(x: jax.Array, knots: np.ndarray) -> jax.Array:
  """Returns the basis of the piecewise linear functions with these knots: `[…] → […, 1 + knots]`."""
  return jnp.concatenate([x[..., None], jax.nn.relu(x[..., None] - knots.astype(x.dtype))], axis=-1)


def ramps(x: jax.Array, knots: np.ndarray) -> jax.Array:
  """Returns how far x has come from each knot to the next, from 0 to 1: `[…] → […, knots - 1]`.

  A linear map of them is piecewise linear in x, and constant beyond the outer knots. Source: piecewise linear encoding,
  arXiv 2203.05556.
  """
  low, high = knots[:-1].astype(x.dtype), knots[1:].astype(x.dtype)
  return jnp.clip((x[..., None] - low) / (high - low), 0, 1)


def gap_basis(hours: jax.Array, unit: Unit) -> jax.Array:
  """Returns the basis in which events and snapshots embed a gap in hours: `[…] → […, n]`; n is `basis_size(unit)`."""
  return bends(log_gap(hours, unit), log_knots(EMBEDDING_KNOTS[unit], unit))


def basis_size(unit: Unit) -> int:
  """Returns the size of `gap_basis`."""
  return 1 + len(EMBEDDING_KNOTS[unit])
