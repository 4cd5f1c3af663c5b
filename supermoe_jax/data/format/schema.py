"""What a config and its fitted encoders come to: the sizes that a model is built from, and what tasks ask.

A dataset and a model never have to look at the events for any of this.
"""

from __future__ import annotations

import numpy as np

from supermoe_jax import config
from supermoe_jax.batch import Schema
from supermoe_jax.data.encoding.aggregates import Aggregator
from supermoe_jax.data.encoding.numeric import Numeric
from supermoe_jax.data.encoding.vocabulary import FIRST_VALUE, Classes, Encoders, Vocabulary
from supermoe_jax.data.tasks.labels import Comparison, EventAnswer
from supermoe_jax.errors import ConfigError, DataError, nearest

SHOWN_VALUES = 20  # of a vocabulary, in a message about a value that it does not hold


def make_schema(cfg: config.Config, encoders: Encoders) -> Schema:
  """The schema of data encoded by `encoders`."""
  aggregator, fields = make_aggregator(cfg.data, encoders), cfg.data.fields
  return Schema(
    tuple(cfg.data.sources),
    {n: e.n_codes for n, e in encoders.categorical.items()},
    tuple(encoders.numeric),
    len(aggregator.names) if aggregator else 0,
    {n: _n_outputs(n, t, encoders) for n, t in cfg.labelled_tasks.items()},
    tuple(n for n in encoders.categorical if fields[n].input),
    tuple(i for i, n in enumerate(encoders.numeric) if fields[n].input),
    cfg.data.extra_value_fields,
    {n: f.shares for n, f in fields.items() if f.shares},
  )


def _n_outputs(name: str, task: config.LabelledTask, encoders: Encoders) -> int:
  if isinstance(task, config.NextEvent):
    return encoders.categorical[task.field].n_codes - FIRST_VALUE
  if isinstance(task, config.UserLabel) and task.type == "multiclass":
    return len(_classes(name, encoders).values)
  return task.top if isinstance(task, config.FutureValues) else 1


def _classes(name: str, encoders: Encoders) -> Classes:
  encoder = encoders.labels[name]
  assert isinstance(encoder, Classes)  # that is how `user_table` encodes a multiclass label
  return encoder


def make_aggregator(data: config.Data, encoders: Encoders) -> Aggregator | None:
  """The aggregates of a config, of the events' fields that are inputs only; None when they are switched off."""
  if not data.aggregates.enabled:
    return None
  columns = list(encoders.categorical)
  counted = {}
  for name in data.aggregates.fields:
    encoder = encoders.categorical[name]
    assert isinstance(encoder, Vocabulary)  # config.resolve checked
    counted[name] = (columns.index(name), tuple(encoder.values[: data.aggregates.top_values]))
  # The mean of a user's own number is that number.
  own = {n for n, f in data.fields.items() if f.input and f.table == "events"}
  numeric = {n: i for i, n in enumerate(encoders.numeric) if n in own}
  return Aggregator(data.aggregates.windows_days, tuple(data.sources), numeric, counted)


def make_event_answer(name: str, task: config.EventLabel, data: config.Data, encoders: Encoders) -> EventAnswer:
  """What an event label says of single events.

  Raises:
    DataError: a positive value is not in the field's vocabulary: it is most likely misspelt.
  """
  if not task.positive:
    statistics = encoders.numeric[task.field]
    least = None if task.at_least is None else statistics.encode(task.at_least, data.fields[task.field].encoding)
    return EventAnswer(list(encoders.numeric).index(task.field), at_least=least)
  encoder = encoders.categorical[task.field]
  assert isinstance(encoder, Vocabulary)  # config.resolve checked
  positive = np.zeros(encoder.n_codes, bool)
  for value in task.positive:
    code = encoder.code(value)
    if code < FIRST_VALUE:
      hint = nearest(value, encoder.values).partition("; valid")[0]
      shown = ", ".join(repr(v) for v in encoder.values[:SHOWN_VALUES])
      more = ", …" if len(encoder.values) > SHOWN_VALUES else ""
      raise DataError(
        f"config.tasks.{name}.positive: {value!r} never occurs in the vocabulary of field {task.field!r}, which is of "
        f"the training period{hint} (it holds {shown}{more})."
      )
    positive[code] = True
  return EventAnswer(list(encoders.categorical).index(task.field), positive)


def make_comparison(cfg: config.Config, name: str, encoders: Encoders) -> Comparison | None:
  """The sample space of a task; numbers in it are as the data have them, so they are encoded as the labels are.

  Raises:
    ConfigError: it compares classes that are no numbers.
  """
  space = config.parse_sample_space(cfg.labelled_tasks[name].sample_space)
  if space is None:
    return None
  other = cfg.labelled_tasks[space.task]
  if config.answer(other) == "multiclass":
    values = _classes(space.task, encoders).values
    try:
      return Comparison(*space, np.array([float(v) for v in values], np.float32))
    except ValueError:
      raise ConfigError(
        f"config.tasks.{name}.sample_space={cfg.labelled_tasks[name].sample_space!r}: the classes of {space.task} are "
        f"not all numbers ({', '.join(map(repr, values[:SHOWN_VALUES]))}); compare a binary task."
      ) from None
  if config.answer(other) == "regression":
    if isinstance(other, config.EventLabel):
      number = encoders.numeric[other.field].encode(space.value, cfg.data.fields[other.field].encoding)
    else:
      statistics = encoders.labels[space.task]
      assert isinstance(statistics, Numeric)  # that is how `user_table` encodes a number
      number = statistics.encode(space.value)
    return Comparison(space.task, space.operator, float(number))
  return Comparison(*space)
