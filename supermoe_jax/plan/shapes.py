"""The shapes of a run's data: as its dataset has them or, before there is one, the largest that its config allows."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from supermoe_jax import config
from supermoe_jax.batch import CALENDAR, Batch, Features, Schema, Slices, Targets
from supermoe_jax.data.encoding.aggregates import Aggregator
from supermoe_jax.data.encoding.vocabulary import FIRST_VALUE
from supermoe_jax.errors import ConfigError


def largest_schema(cfg: config.Config) -> Schema:
  """The schema of the largest dataset that a config allows: every vocabulary is full.

  Raises:
    ConfigError: a task's classes are what a table of users holds, which only a dataset can tell.
  """
  fields = cfg.data.fields
  sizes: dict[str, int] = {}
  for name, field in fields.items():
    if field.kind != "numeric":
      own = fields[field.shares] if field.shares else field
      sizes[name] = own.size + FIRST_VALUE + own.buckets
  numeric = [n for n, f in fields.items() if f.kind == "numeric"]
  return Schema(
    tuple(cfg.data.sources),
    sizes,
    tuple(numeric),
    _aggregates(cfg.data),
    {n: _outputs(n, t, sizes) for n, t in cfg.active_views.items()},
    tuple(n for n in sizes if fields[n].input),
    tuple(i for i, n in enumerate(numeric) if fields[n].input),
    cfg.data.extra_value_fields,
    {n: f.shares for n, f in fields.items() if f.shares},
  )


def _aggregates(data: config.Data) -> int:
  if not data.aggregates.enabled:
    return 0
  counted = tuple(str(i) for i in range(data.aggregates.top_values))
  numeric = {n: 0 for n, f in data.fields.items() if f.kind == "numeric" and f.input and f.table == "events"}
  values = dict.fromkeys(data.aggregates.fields, (0, counted))
  return len(Aggregator(data.aggregates.windows_days, tuple(data.sources), numeric, values).names)


def _outputs(name: str, task: config.LabelledTask, sizes: dict[str, int]) -> int:
  if isinstance(task, config.NextEvent):
    return sizes[task.field] - FIRST_VALUE
  if isinstance(task, config.UserLabel) and task.type == "multiclass":
    raise ConfigError(
      f"config.tasks.{name}: how many classes column {task.column!r} has is known once the dataset is prepared; run "
      f"'supermoe prepare' first, or leave the task out by --config.exclude_tasks={name}"
    )
  return task.top if isinstance(task, config.FutureValues) else 1


def batch_shapes(cfg: config.Config, schema: Schema) -> Batch:
  """The shapes and dtypes of a training batch of all hosts: what `dataset.training_batches.training_batches` makes."""
  rows, events, snapshots = cfg.train.batch_rows, cfg.model.max_events, cfg.train.snapshots_per_row
  tasks = cfg.active_tasks
  targets = {n: _targets(t, schema.outputs[n], (rows, events, snapshots)) for n, t in cfg.active_views.items()}
  slices = {
    n: Slices(_features(schema, (rows, 2), t.slice_events, 1), _array(bool, rows))
    for n, t in tasks.items()
    if isinstance(t, config.Contrast)
  }
  return Batch(_features(schema, (rows,), events, snapshots), targets, slices)


def _array(dtype: Any, *shape: int) -> Any:
  return jax.ShapeDtypeStruct(shape, np.dtype(dtype))


def _features(schema: Schema, rows: tuple[int, ...], events: int, snapshots: int) -> Features:
  codes = len(schema.categorical) + len(schema.extra_columns)

  def of_events(dtype: type, *last: int) -> Any:
    return _array(dtype, *rows, events, *last)

  def of_snapshots(dtype: type, *last: int) -> Any:
    return _array(dtype, *rows, snapshots, *last)

  return Features(
    codes=of_events(np.int32, codes),
    source=of_events(np.int32),
    numeric=of_events(np.float32, len(schema.numeric)),
    calendar=of_events(np.float32, CALENDAR),
    time=of_events(np.float32),
    gap=of_events(np.float32),
    segment=of_events(np.int32),
    query_events=of_snapshots(np.int32),
    query_segment=of_snapshots(np.int32),
    query_time=of_snapshots(np.float32),
    query_gap=of_snapshots(np.float32),
    query_calendar=of_snapshots(np.float32, CALENDAR),
    query_aggregates=of_snapshots(np.float32, schema.aggregates),
  )


def _targets(task: config.LabelledTask, outputs: int, sizes: tuple[int, int, int]) -> Targets:
  rows, events, snapshots = sizes
  sites, given = snapshots, 0
  if isinstance(task, config.EventLabel):
    sites, given = events + snapshots * task.per_snapshot, len(task.given)
  elif isinstance(task, config.NextEvent):
    sites = events + snapshots
  form = config.answer(task)
  several = (outputs,) if form == "multilabel" else ()
  value = _array(np.int32 if form in ("catalogue", "multiclass") else np.float32, rows, sites, *several)
  of_site = _array(bool, rows, sites), _array(np.float32, rows, sites)
  return Targets(value, *of_site, _array(np.int32, rows, sites, given))
