"""Derives a dataset's schema, aggregates and sample spaces from its config and encoders."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from supermoe_jax import config
from supermoe_jax.batch import FIRST_VALUE, Schema, ValueCounts
from supermoe_jax.data.encoding.aggregates import (
  Aggregator,
  Amount,
  DistinctField,
  EventCount,
  FactoredField,
  habit_names,
)
from supermoe_jax.data.encoding.numeric import NumberEncoder, Numeric
from supermoe_jax.data.encoding.vocabulary import Classes, Encoders, Vocabulary
from supermoe_jax.data.tasks import KINDS, TaskKind
from supermoe_jax.data.tasks.event_condition import EventCondition, bind_condition
from supermoe_jax.data.tasks.listing import SHOWN_VALUES
from supermoe_jax.data.tasks.sample_space import LabelComparison
from supermoe_jax.errors import ConfigError


def make_schema(cfg: config.Config, encoders: Encoders) -> Schema:
  """Returns the schema of data encoded by `encoders`."""
  aggregator = make_aggregator(cfg.data, encoders)
  return schema_of_sizes(
    cfg,
    {name: encoder.n_codes for name, encoder in encoders.categorical.items()},
    {name: len(labels.values) for name, labels in encoders.labels.items() if isinstance(labels, Classes)},
    len(aggregator.names) if aggregator else 0,
  )


def schema_of_sizes(
  cfg: config.Config,
  codes: Mapping[str, int],
  classes: Mapping[str, int],
  aggregates: int,
  tasks: Mapping[str, config.LabelledTask] | None = None,
) -> Schema:
  """Returns the schema of a config from the sizes of its fields, labels and aggregates.

  Args:
    cfg: the config.
    codes: the number of codes of each categorical field, in the order of their columns.
    classes: the number of classes of each multi-class label.
    aggregates: A, the length of a snapshot's aggregates.
    tasks: the tasks that have outputs; None for all tasks with labels.

  Raises:
    ConfigError: a task is multi-class, and `classes` lacks it.
  """
  fields = cfg.data.fields
  numeric = [name for name, field in fields.items() if field.kind == "numeric"]
  labelled = cfg.labelled_tasks if tasks is None else tasks
  value_counts, first_factor = _aggregate_places(cfg.data, codes)
  return Schema(
    sources=tuple(cfg.data.sources),
    categorical=dict(codes),
    numeric=tuple(numeric),
    aggregates=aggregates,
    outputs={name: KINDS[task.kind].outputs(name, task, codes, classes) for name, task in labelled.items()},
    inputs=tuple(name for name in codes if fields[name].input and fields[name].kind != "vector"),
    numeric_inputs=tuple(i for i, name in enumerate(numeric) if fields[name].input),
    extra_columns=cfg.data.extra_value_fields,
    shares={name: field.shares for name, field in fields.items() if field.shares},
    vectors={name: fields[name].size for name in codes if fields[name].kind == "vector"},
    value_counts=value_counts,
    factors=(first_factor, aggregates - 2) if aggregates else (0, 0),  # recency and tenure follow
  )


def _aggregate_places(data: config.Data, codes: Mapping[str, int]) -> tuple[dict[str, ValueCounts], int]:
  """Returns where the counts of each field's values lie among the aggregates, and the first column of the factors.

  Both follow the order of `Aggregator.names`.
  """
  wanted, places = data.aggregates, dict[str, ValueCounts]()
  if not wanted.enabled:
    return places, 0
  windows = len(wanted.windows_days) + 1
  means = sum(f.kind == "numeric" and f.input and f.table == "events" for f in data.fields.values())
  first = windows * (len(data.sources) + 1 + means)
  for name in dict.fromkeys(wanted.fields):
    places[name] = ValueCounts(first, windows, min(wanted.top_values, codes[name] - FIRST_VALUE))
    first = places[name].columns.stop + 1  # the number of distinct values follows
  first += windows * sum(map(len, (wanted.sums, wanted.means, wanted.distinct, wanted.conditions)))
  first += (windows - 1) * (len(wanted.trends) + wanted.paces * (1 + len(wanted.sums)))
  first += wanted.habits * min(windows, 2) * len(habit_names())
  return {name: place for name, place in places.items() if place.values}, first


def make_aggregator(data: config.Data, encoders: Encoders) -> Aggregator | None:
  """Returns the aggregator of a config, over the events' input fields only; None when aggregates are switched off.

  Raises:
    DataError: a condition names a value that is not in the data.
  """
  wanted = data.aggregates
  if not wanted.enabled:
    return None
  columns, encodings = list(encoders.categorical), {name: field.encoding for name, field in data.fields.items()}
  counted, amounts = {}, {}
  for name in wanted.fields:
    encoder = encoders.categorical[name]
    assert isinstance(encoder, Vocabulary)  # config.resolve checked
    counted[name] = (columns.index(name), tuple(encoder.values[: wanted.top_values]))
  for name in wanted.amounts:
    number = encoders.numeric[name]
    assert isinstance(number, Numeric)  # config.resolve checked
    amounts[name] = Amount(list(encoders.numeric).index(name), number, encodings[name])
  # Numbers of the table of users are left out: the mean of a user's own number is that number.
  own = {n for n, f in data.fields.items() if f.input and f.table == "events"}
  numeric = {n: i for i, n in enumerate(encoders.numeric) if n in own}
  conditions = {
    name: EventCount(where, bind_aggregate(name, where, encoders.categorical, encoders.numeric, encodings))
    for name, where in wanted.conditions.items()
  }
  return Aggregator(
    wanted.windows_days,
    tuple(data.sources),
    numeric,
    counted,
    amounts,
    wanted.sums,
    wanted.means,
    wanted.trends,
    {name: _distinct_field(name, data, encoders) for name in wanted.distinct},
    conditions,
    wanted.paces,
    wanted.habits,
    {
      name: FactoredField(
        _code_columns(name, data, encoders),
        encoders.factors[name],
        list(encoders.numeric).index(wanted.factor_numbers[name]) if name in wanted.factor_numbers else None,
      )
      for name in wanted.factors
    },
  )


def bind_aggregate(
  name: str,
  where: str,
  categorical: Mapping[str, object],
  numeric: Mapping[str, NumberEncoder],
  encodings: Mapping[str, str],
) -> EventCondition:
  """Returns the condition `name` of a config's aggregates; see `bind_condition`."""
  return bind_condition(f"config.data.aggregates.conditions.{name}", where, categorical, numeric, encodings)


def _distinct_field(name: str, data: config.Data, encoders: Encoders) -> DistinctField:
  if name in encoders.numeric:
    return DistinctField((list(encoders.numeric).index(name),), numeric=True)
  return DistinctField(_code_columns(name, data, encoders))


def _code_columns(name: str, data: config.Data, encoders: Encoders) -> tuple[int, ...]:
  """Returns a field's columns of codes: one, or several for a field of lists."""
  further = [i for i, n in enumerate(data.extra_value_fields, len(encoders.categorical)) if n == name]
  return (list(encoders.categorical).index(name), *further)


def make_comparison(
  tasks: Mapping[str, config.LabelledTask], kinds: Mapping[str, TaskKind], name: str
) -> LabelComparison | None:
  """Returns the sample space of a task, or None; its number is in the units of the compared task's labels.

  Args:
    tasks: all tasks with labels.
    kinds: bound tasks, which must include the compared task.
    name: the task with the sample space.

  Raises:
    ConfigError: the sample space compares classes that are not numbers.
  """
  space = config.parse_sample_space(tasks[name].sample_space)
  if space is None:
    return None
  other = kinds[space.task]
  values = other.class_values()
  if values is None:
    return LabelComparison(space.task, space.operator, other.encoded(space.value))
  try:
    return LabelComparison(*space, np.array([float(v) for v in values], np.float32))
  except ValueError:
    raise ConfigError(
      f"config.tasks.{name}.sample_space={tasks[name].sample_space!r}: the classes of {space.task} are not all numbers "
      f"({', '.join(map(repr, values[:SHOWN_VALUES]))}); compare a binary task."
    ) from None
