"""Counts which experts serve which events, by the events' source and by the values of their fields.

Shapes: M layers of experts, B rows, L events, K experts a token, E experts, N event tokens counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from supermoe_jax.batch import ABSENT, FIRST_VALUE, UNKNOWN
from supermoe_jax.data.dataset import snapshot_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.snapshot_batches import QueryBatch
from supermoe_jax.data.encoding.splits import TEST
from supermoe_jax.data.encoding.vocabulary import Vocabulary
from supermoe_jax.progress import ProgressBar
from supermoe_jax.training.run import Run

# Test snapshots to draw, and event tokens after which no more are read: with this many tokens, shares are known to
# about a percent.
SNAPSHOTS = 1000
TOKENS = 100_000

# The number of most frequent values of each field that are counted one by one.
VALUES = 12

# Names for a field's codes that stand for no value of its vocabulary.
OTHER = "(out of vocabulary)"
HASHED = "(other values, hashed)"


def count_experts(run: Run, *, progress: bool = True) -> dict[str, Any] | None:
  """Counts the experts that the events of a sample of test snapshots were routed to.

  Returns: None for a model without expert layers. Otherwise `snapshots` and `tokens`, the numbers counted; the choices
    of each layer's experts `[M, E]` in all (`overall`), for each source (`sources`) and for each field's most frequent
    values (`fields`); and `unnamed`, the fields whose values are hashes, which have no name to show.
  """
  model = run.cfg.model
  if model.encoder == "gru" or not model.moe_every or model.layers < model.moe_every:
    return None
  asked = snapshot_batches.query_batches(run.dataset, run.cfg, split=TEST, most=SNAPSHOTS)
  expected = min(run.dataset.manifest["snapshots"]["test"], SNAPSHOTS)
  snapshots, tokens = 0, 0
  sources: list[np.ndarray] = []
  codes: list[np.ndarray] = []
  experts: list[np.ndarray] = []
  bar = ProgressBar(
    total=expected, desc="routing of events", unit=" snapshots", mininterval=1, disable=not progress, leave=None
  )
  with bar:
    for batch in asked:
      chosen, valid = run.event_experts(batch.features), _valid(batch)
      sources.append(np.asarray(batch.features.source)[valid])
      codes.append(np.asarray(batch.features.codes)[valid])
      experts.append(chosen[:, valid])
      snapshots += len(batch.questions)
      tokens += int(valid.sum())
      bar.update(len(batch.questions))
      if tokens >= TOKENS:
        break
  return {
    "snapshots": snapshots,
    "tokens": tokens,
    **count_choices(
      run.dataset, np.concatenate(sources), np.concatenate(codes), np.concatenate(experts, axis=1), model.experts
    ),
  }


def _valid(batch: QueryBatch) -> np.ndarray:
  """Returns whether there is an event, bool `[B, L]`; rows beyond the questions are all padding."""
  valid = np.asarray(batch.features.segment) > 0
  valid[len(batch.questions) :] = False
  return valid


def count_choices(
  dataset: Dataset, source: np.ndarray, codes: np.ndarray, expert: np.ndarray, experts: int
) -> dict[str, Any]:
  """Counts the choices `expert [M, N, K]` of events with sources `source [N]`, from 1, and `codes [N, F]`."""
  schema = dataset.schema
  columns = [*schema.categorical, *schema.extra_columns]
  fields: dict[str, list[dict[str, Any]]] = {}
  unnamed = []
  for name in schema.inputs:
    encoder = dataset.encoders.categorical[schema.shares.get(name, name)]
    if not isinstance(encoder, Vocabulary):
      unnamed.append(name)
      continue
    # An event with several values counts for each of them.
    where = [i for i, column in enumerate(columns) if column == name]
    value, of = codes[:, where].reshape(-1), np.repeat(np.arange(len(codes)), len(where))
    value = np.minimum(value, len(encoder.values) + FIRST_VALUE)  # counts all hashed values as one
    frequent, number = np.unique(value[value != ABSENT], return_counts=True)
    top = frequent[np.argsort(-number, kind="stable")][:VALUES]
    fields[name] = [
      {"name": _name(encoder, int(code)), **_choices(expert[:, of[value == code]], experts)} for code in top
    ]
  return {
    "overall": _choices(expert, experts)["choices"],
    "sources": [
      {"name": name, **_choices(expert[:, source == i], experts)} for i, name in enumerate(schema.sources, 1)
    ],
    "fields": {n: rows for n, rows in fields.items() if rows},
    "unnamed": unnamed,
  }


def _name(encoder: Vocabulary, code: int) -> str:
  if code == UNKNOWN:
    return OTHER
  return HASHED if code == len(encoder.values) + FIRST_VALUE else encoder.values[code - FIRST_VALUE]


def _choices(expert: np.ndarray, experts: int) -> dict[str, Any]:
  """Returns the number of `tokens`, and how often each expert of each layer was chosen: `choices [M, E]`."""
  counts = [np.bincount(layer.reshape(-1), minlength=experts).tolist() for layer in expert]
  return {"tokens": expert.shape[1], "choices": counts}


def expert_lift(row: Mapping[str, Any], overall: np.ndarray, layer: int) -> np.ndarray:
  """Returns the lift of a row's tokens for each expert of a layer, `[E]`; NaN for an expert that no token chose.

  The lift is the expert's share of the choices of the row's tokens, divided by its share of the choices of all tokens.
  `overall [E]` are the choices of all tokens in that layer.
  """
  own = np.array(row["choices"][layer], np.float64)
  with np.errstate(divide="ignore", invalid="ignore"):
    return np.where(overall > 0, own / max(own.sum(), 1) / (overall / overall.sum()), np.nan)
