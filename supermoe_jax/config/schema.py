"""The settings of a run as frozen dataclasses; the defaults stand here."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import fnmatch
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

MICROSECONDS_PER_DAY = 86_400_000_000


class ConfigError(ValueError):
  """A configuration that cannot be used; the message names the key and the remedy."""


def nearest(name: str, valid: Iterable[str]) -> str:
  """Returns a hint such as `; did you mean 'steps'?`, or the list of valid names when none is near."""
  valid = sorted(str(v) for v in valid)
  close = difflib.get_close_matches(name, valid, n=1)
  if close:
    return f"; did you mean '{close[0]}'?"
  return f"; valid: {', '.join(valid)}" if valid else ""


# --------------------------------------------------------------------------------------------------------------- data


@dataclasses.dataclass(frozen=True)
class ItemTable:
  """A table joined to the events of a source by `key`, such as product attributes."""

  file: str = ""
  key: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
  """One kind of event: files of one layout. The name of the source is the event's type."""

  files: tuple[str, ...] = ()  # paths or globs
  format: Literal["auto", "parquet", "csv", "jsonl", "atomic"] = "auto"  # auto: by the file's ending
  user: str = "user_id"
  time: str = "timestamp"
  time_unit: Literal["auto", "s", "ms", "us"] = "auto"  # of numeric times; auto: seconds, checked for plausibility
  time_format: str = ""  # strptime format of textual times; empty: ISO 8601, without an offset read as UTC
  items: ItemTable | None = None


@dataclasses.dataclass(frozen=True)
class Field:
  """A value carried by events: the model's vocabulary of what happened."""

  kind: Literal["vocabulary", "hash", "numeric"] = "vocabulary"
  column: str = ""  # empty: the field's own name
  sources: tuple[str, ...] = ()  # empty: every source; elsewhere the field is absent, which is not out-of-vocabulary
  size: int = 100_000  # vocabulary: most values kept, by count in the training period; hash: buckets
  min_count: int = 1  # vocabulary: rarer values become out-of-vocabulary
  encoding: Literal["log1p", "standardise"] = "standardise"  # numeric: log1p is sign(x)·log(1+|x|), then standardised


@dataclasses.dataclass(frozen=True)
class UserTable:
  """Columns known of some users, such as demographics; the source of user labels."""

  files: tuple[str, ...] = ()
  format: Literal["auto", "parquet", "csv", "jsonl", "atomic"] = "auto"
  user: str = "user_id"


@dataclasses.dataclass(frozen=True)
class Split:
  """How time and users are divided into training, validation and test.

  `temporal`: snapshots at fixed times; the training period ends at `train_end`, and no training label window reaches
  past it. `leave_one_out`: the last event of each user is the test target, the last but one validation.
  """

  mode: Literal["temporal", "leave_one_out"] = "temporal"
  train_start: str = ""  # first training snapshot; empty: one `every_days` after the first event
  train_end: str = ""
  every_days: float = (
    5.0  # distance of training snapshots, back from train_end; no multiple of a week meets all weekdays
  )
  validation: tuple[str, ...] = ()
  test: tuple[str, ...] = ()
  log_end: str = ""  # the log is complete up to here; empty: the time of the last event
  min_events: int = 1  # a snapshot with fewer events before it is left out, and counted
  user_validation: float = 0.1  # share of users (by hash) whose user labels are held out for validation
  user_test: float = 0.2  # and for test


@dataclasses.dataclass(frozen=True)
class Aggregates:
  """Point-in-time counts given to every query token (`method.md` §7 style inputs); strictly before the snapshot."""

  enabled: bool = True
  windows_days: tuple[float, ...] = (1.0, 7.0, 28.0, 90.0)  # and always: the whole history
  top_values: int = 0  # most frequent values counted of each field in `fields`
  fields: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Data:
  """The event log and where its prepared form goes."""

  path: str = ""  # dataset directory
  sources: Mapping[str, Source] = dataclasses.field(default_factory=dict)
  fields: Mapping[str, Field] = dataclasses.field(default_factory=dict)
  users: UserTable | None = None
  split: Split = Split()
  aggregates: Aggregates = Aggregates()
  on_bad_rows: Literal["error", "drop"] = "error"  # rows without user or time, or with an unparsable value
  duplicates: Literal["keep", "drop"] = "keep"  # rows equal in user, time, source and every field
  memory: str = "2GB"  # DuckDB's budget; beyond it sorting spills to disk


# -------------------------------------------------------------------------------------------------------------- tasks


@dataclasses.dataclass(frozen=True)
class NextEvent:
  """The value of `field` in the next event that has one: softmax over its vocabulary, ranked in full."""

  kind: ClassVar[str] = "next_event"
  field: str = ""
  exclude_seen: bool = False  # evaluation: values already in the user's history cannot be recommended
  weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class FutureEvent:
  """Whether any event of `source` happens in [τ, τ + horizon_days); `negate` for "nothing happens" (churn)."""

  kind: ClassVar[str] = "future_event"
  source: str = ""
  horizon_days: float = 28.0
  negate: bool = False
  weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class FutureValues:
  """Which of the `top` most frequent values of `field` occur in [τ, τ + horizon_days): one binary label each."""

  kind: ClassVar[str] = "future_values"
  field: str = ""
  top: int = 50
  horizon_days: float = 28.0
  weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class UserLabel:
  """Whether the user table's `column` holds one of `positive`; users without a value have no label."""

  kind: ClassVar[str] = "user_label"
  column: str = ""
  positive: tuple[str, ...] = ()
  weight: float = 1.0


Task = NextEvent | FutureEvent | FutureValues | UserLabel
TASK_KINDS: dict[str, type] = {t.kind: t for t in (NextEvent, FutureEvent, FutureValues, UserLabel)}


# ----------------------------------------------------------------------------------------------------- model, training


@dataclasses.dataclass(frozen=True)
class Model:
  """Sizes of the encoder. L is `max_events`, D `d_model`, E `experts`, K `experts_per_token`."""

  d_model: int = 64
  layers: int = 2
  heads: int = 4
  d_hidden: int = 256  # of the dense blocks' MLP
  moe_every: int = 2  # every n-th block holds experts instead of an MLP; 0: none
  experts: int = 8
  experts_per_token: int = 2
  d_expert: int = 128
  shared_experts: int = 0  # of width d_expert, which every token visits besides
  activation: Literal["gelu", "swiglu"] = "gelu"
  capacity_factor: float = 1.25  # training only; evaluation and export never drop
  dispatch: Literal["auto", "dense", "sorted", "all_to_all", "gather", "ragged"] = "auto"  # see layers/dispatch.py
  router_jitter: float = 0.0  # noise on the tokens that the router sees in training
  dtype: Literal["float32", "bfloat16"] = "float32"  # of products; parameters, router and sums are float32
  remat: Literal["none", "dots", "full"] = "none"  # what the backward pass computes again; dots: all but products
  max_events: int = 256
  dropout: float = 0.1


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices along each mesh axis; 1×1×1 is one device."""

  data: int = 1
  expert: int = 1
  tensor: int = 1
  slices: int = 1  # of TPU, joined by a data-centre network; `data` spans them


@dataclasses.dataclass(frozen=True)
class Train:
  """Optimisation."""

  seed: int = 0
  steps: int = 1000
  batch_rows: int = 32
  snapshots_per_row: int = 8
  learning_rate: float = 1e-3
  warmup_steps: int = 50
  final_learning_rate: float = 0.02  # share of the peak that the cosine schedule ends on
  weight_decay: float = 0.01
  clip_norm: float = 1.0
  balance_weight: float = 0.01
  z_weight: float = 1e-3
  balance_rate: float = 0.0  # step of the routers' balancing bias (loss-free balancing, arXiv 2408.15664); 0: no bias
  checkpoint_every: int = 200
  checkpoints_kept: int = 2
  log_every: int = 20
  mesh: Mesh = Mesh()


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """Evaluation and embedding."""

  batch_rows: int = 64
  cutoffs: tuple[int, ...] = (5, 10)  # k of HR@k and NDCG@k
  catalogue_chunk: int = 8192  # values scored at a time in full ranking


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run."""

  data: Data = Data()
  tasks: Mapping[str, Task] = dataclasses.field(default_factory=dict)
  exclude_tasks: tuple[str, ...] = ()  # names or globs of tasks that this run neither trains nor evaluates
  model: Model = Model()
  train: Train = Train()
  evaluate: Evaluate = Evaluate()

  @property
  def active_tasks(self) -> dict[str, Task]:
    """The tasks of this run, by name."""
    return {n: t for n, t in self.tasks.items() if not any(fnmatch.fnmatchcase(n, p) for p in self.exclude_tasks)}

  def data_identity(self) -> dict[str, Any]:
    """What preparation depends on: the data section (but for its path and memory) and all tasks' labels."""
    whole = to_dict(self)
    data = {k: v for k, v in whole["data"].items() if k not in ("path", "memory")}
    not_labels = ("weight", "exclude_seen")
    tasks = {n: {k: v for k, v in t.items() if k not in not_labels} for n, t in whole["tasks"].items()}
    return {"data": data, "tasks": tasks}

  def data_hash(self) -> str:
    """Identifies a preparation."""
    return _digest(self.data_identity())

  def hash(self) -> str:
    """Identifies the whole configuration."""
    return _digest(to_dict(self))


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def parse_time(text: str, path: str) -> int:
  """Returns microseconds since 1970-01-01 UTC of an ISO 8601 time; without an offset it is read as UTC."""
  try:
    moment = datetime.datetime.fromisoformat(text)
  except ValueError:
    raise ConfigError(f"{path}={text!r} is not a time; write it as 2017-10-01 or 2017-10-01T12:00:00.") from None
  if moment.tzinfo is None:
    moment = moment.replace(tzinfo=datetime.UTC)
  epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
  return (moment - epoch) // datetime.timedelta(microseconds=1)


def to_dict(value: Any) -> Any:
  """Turns resolved dataclasses into plain dicts, lists and scalars, ready for JSON."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    out = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {"kind": value.kind, **out} if type(value) in TASK_KINDS.values() else out  # type: ignore[attr-defined]
  if isinstance(value, Mapping):
    return {k: to_dict(v) for k, v in value.items()}
  if isinstance(value, (tuple, list)):
    return [to_dict(v) for v in value]
  return value
