"""Counts the parameters of a model, and the active ones, which a token uses."""

from __future__ import annotations

import math
from typing import NamedTuple

from flax import nnx

from supermoe_jax.layers.table import TableRows


class Parameters(NamedTuple):
  """Parameter counts of a model.

  Attributes:
    total: all parameters.
    tables: parameters in the rows of tables.
    active: parameters that a token uses: all but the rows of tables and the experts that the token does not choose.
  """

  total: int
  tables: int
  active: int


def count_parameters(variables: nnx.State, chosen: float) -> Parameters:
  """Counts the variables of a model, abstract or not; a token chooses the share `chosen` of its experts.

  Padding that fills up the stripes of a table, or of a parameter with one entry per row, does not count.
  """
  tables = rest = active = 0.0
  for _, variable in nnx.to_flat_state(variables):
    shape, about = variable.get_value().shape, variable.get_metadata()
    names = about.get("logical") or ()
    size = about["size"] * about.get("width", 1) if "rows" in names else math.prod(shape)
    if isinstance(variable, TableRows):
      tables += size
    elif isinstance(variable, nnx.Param):
      rest += size
      active += size * (chosen if "expert" in names else 1)
  return Parameters(int(tables + rest), int(tables), round(active))
