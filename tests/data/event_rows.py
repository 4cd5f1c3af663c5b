"""Rows that the tests of event logs start from."""

from __future__ import annotations

from supermoe_jax import config
from supermoe_jax.data import vocabulary
from supermoe_jax.data.events import EventLog
from supermoe_jax.data.histories import UserHistory, read_block

SECOND = 1_000_000
JUNE_1 = config.parse_time("2020-06-01", "") // SECOND  # in seconds, as the files have it
ABSENT, UNKNOWN = vocabulary.ABSENT, vocabulary.UNKNOWN

PRICE = {"item": {}, "price": {"kind": "numeric"}}
LEAVE_ONE_OUT = {"mode": "leave_one_out"}


def good_rows(**changes):
  """Three events of two users; a change replaces a column or adds one."""
  columns = {"user": ["a", "b", "a"], "time": [JUNE_1 + 2, JUNE_1 + 1, JUNE_1], "item": ["x", "y", "x"]}
  return {**columns, "price": ["1.5", "2", "4"], **changes}


def times(history):
  return (history.time // SECOND).tolist()


def histories(log: EventLog, encoders: vocabulary.Encoders, n_shards: int = 1) -> list[UserHistory]:
  """Every user's encoded events, users in the order of their ids."""
  out = []
  n_codes = len(encoders.categorical) + len(log.data.further_values)
  for _, users, rows in log.shards(encoders, n_shards):
    block = read_block(rows, users, n_codes, list(encoders.numeric.values()))
    out += [block.history(i) for i in range(len(users))]
  return sorted(out, key=lambda history: history.user)
