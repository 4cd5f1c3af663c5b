"""Computes the shapes of a run's data: from its dataset or, without one, the largest shapes that its config allows."""

from __future__ import annotations

from typing import Any, cast

import jax
import numpy as np

from supermoe_jax import config
from supermoe_jax.batch import CALENDAR, FIRST_VALUE, Batch, Features, Schema, Slices, Targets
from supermoe_jax.data.encoding.aggregates import Aggregator
from supermoe_jax.data.format.schema import schema_of_sizes
from supermoe_jax.data.tasks.labels import label_shape


def largest_schema(cfg: config.Config) -> Schema:
  """Returns the schema of the largest dataset that a config allows, in which every vocabulary is full.

  Raises:
    ConfigError: a task's classes are the values in a table of users, which only a dataset knows.
  """
  fields = cfg.data.fields
  sizes: dict[str, int] = {}
  for name, field in fields.items():
    if field.kind != "numeric":
      own = fields[field.shares] if field.shares else field
      sizes[name] = own.size + FIRST_VALUE + own.buckets
  return schema_of_sizes(cfg, sizes, {}, _aggregates(cfg.data), cfg.active_views)


def _aggregates(data: config.Data) -> int:
  wanted = data.aggregates
  if not wanted.enabled:
    return 0
  counted = tuple(str(i) for i in range(wanted.top_values))
  numeric = {n: 0 for n, f in data.fields.items() if f.kind == "numeric" and f.input and f.table == "events"}
  values = dict.fromkeys(wanted.fields, (0, counted))
  usual = Aggregator(
    wanted.windows_days, tuple(data.sources), numeric, values, paces=wanted.paces, habits=wanted.habits
  )
  windows = len(usual.windows)
  added = windows * sum(map(len, (wanted.sums, wanted.means, wanted.distinct, wanted.conditions)))
  added += (windows - 1) * len(wanted.sums) * wanted.paces
  factors = wanted.factor_size * len(wanted.factors)
  return len(usual.names) + added + (windows - 1) * len(wanted.trends) + factors


def batch_shapes(cfg: config.Config, schema: Schema, tie_rate: float = 0.0) -> Batch:
  """Returns the shapes and dtypes of a batch of all hosts, as `dataset.training_batches.training_batches` makes it.

  `tie_rate` is the dataset's.
  """
  rows, events, snapshots = cfg.train.batch_rows, cfg.model.max_events, cfg.train.snapshots_per_row
  tasks = cfg.active_tasks
  of_moments = {n: t.values_of_a_moment(tie_rate, cfg.data.split.mode) for n, t in cfg.active_views.items()}
  targets = {
    n: _targets(t, schema.outputs[n], of_moments[n], (rows, events, snapshots)) for n, t in cfg.active_views.items()
  }
  slices = {
    n: Slices(_features(schema, (rows, 2), cast(config.Contrast, t).slice_events, 1), _array(bool, rows))
    for n, t in tasks.items()
    if not t.has_labels
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
    vectors=of_events(np.float16, sum(schema.vectors.values())),
  )


def _targets(task: config.LabelledTask, outputs: int, of_moment: int, sizes: tuple[int, int, int]) -> Targets:
  rows, events, snapshots = sizes
  sites, given = snapshots * task.asked_events, len(task.given_fields)
  if task.asks_at_events:
    sites += events
  form = task.answer
  value = _array(
    np.int32 if form in ("catalogue", "multiclass") else np.float32, rows, sites, *label_shape(form, outputs)
  )
  of_site = _array(bool, rows, sites), _array(np.float32, rows, sites)
  also = max(of_moment - 1, 0)
  return Targets(value, *of_site, _array(np.int32, rows, sites, given), _array(np.int32, rows, sites, also))
