"""How many parameters a model has, and which of them are at work."""

from __future__ import annotations

import math
from typing import NamedTuple

from flax import nnx

from supermoe_jax.layers.table import TableRows


class Parameters(NamedTuple):
  """Numbers of parameters.

  Attributes:
    total: all of them.
    tables: those in the rows of tables.
    active: those that a token meets: all but the tables' and, of experts, those that it does not choose.
  """

  total: int
  tables: int
  active: int


def count_parameters(variables: nnx.State, chosen: float) -> Parameters:
  """Counts the variables of a model, abstract or not; of its experts a token chooses the share `chosen`.

  What only fills up the stripes of a table, or of what lies beside its rows, is none.
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
