"""Defines the settings of a run and their defaults as frozen dataclasses."""

from __future__ import annotations

import dataclasses
import datetime
import fnmatch
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, cast

from supermoe_jax.config.rounds import Steps
from supermoe_jax.config.tables import ADDED_LATER, Aggregates, Source, UserTable
from supermoe_jax.config.tasks import NOT_PREPARED, TASK_KINDS, LabelledTask, Task
from supermoe_jax.errors import ConfigError

MICROSECONDS_PER_DAY = 86_400_000_000


@dataclasses.dataclass(frozen=True)
class Field:
  """A value that events carry, such as an item or a price; together the fields describe events to the model.

  With `buckets`, values outside the vocabulary are hashed into this number of codes instead of sharing one code. The
  model learns these codes from training values that the vocabulary leaves out, so `min_count` or `size` must leave some
  out. Such a field is an input only: no task may ask about it, and aggregates do not count it.

  With `shares`, a field uses the vocabulary and the embedding table of another field, code for code. An example is the
  item that was bought and the item that was shown.

  A hash with more buckets than a table can have rows, and a hash with two hash functions, take several fields of one
  column, whose embeddings add up. `config.hash_fields` writes these fields.

  With `table="users"` the column comes from the table of users, and every event of a user carries the user's value. The
  field is absent where the user has no row or no value. The column has no time, and the model sees it from the first
  event on. So it must hold facts known from the start, such as the country of signing up. A fact found out later, such
  as the lifetime value, leaks the future into every snapshot.

  With `kind="vector"` each value is a list of `size` numbers, such as a pretrained embedding of an item's text. The
  dataset keeps each distinct vector once and unchanged, and the model learns a projection. It is an input only.
  """

  kind: Literal["vocabulary", "hash", "numeric", "vector"] = "vocabulary"
  column: str = ""  # empty: the field's own name; "props.item": the member `item` of the column `props` of objects
  table: Literal["events", "users"] = "events"  # users: `data.users`; events: a source's files or its item table
  sources: tuple[str, ...] = ()  # empty: every source; in others the field is absent, not out of vocabulary
  size: int = 100_000  # vocabulary: most values, the most frequent in training; hash: buckets; vector: its length
  min_count: int = 1  # vocabulary: rarer values are out of vocabulary
  buckets: int = 0  # vocabulary: number of codes for hashed out-of-vocabulary values; 0: they share one code
  part: int = 0  # hash: the part (of `parts` equal ones) whose buckets this field has; other values are absent
  parts: int = 1
  half: Literal["lower", "upper"] = "lower"  # hash: which 64 bits of the value's MD5 choose the bucket
  shares: str = ""  # vocabulary: the field whose vocabulary (fitted on that field alone) and table are used
  # numeric: log1p is sign(x)·log(1+|x|), then standardised; quantile is the standard-normal quantile of the rank.
  encoding: Literal["log1p", "standardise", "quantile"] = "standardise"
  input: bool = True  # False: read for labels only; the model never sees it
  many: int = 0  # vocabulary, hash: the column holds lists, cut to their first `many` values; 0: single values
  separator: str = "|"  # separates the values of a list, or the numbers of a vector, where the column is text
  # null: the field is absent in files that lack the column, and they are counted; error: all have it
  missing: Literal["error", "null"] = dataclasses.field(default="error", metadata=ADDED_LATER)


# Most buckets of one table: codes are int32, and the largest and smallest codes stand for "no row".
MOST_ROWS = 2**31 - 2**24 - 4


@dataclasses.dataclass(frozen=True)
class Split:
  """The division of time and users into training, validation and test.

  `temporal`: snapshots lie at fixed times. The training period ends at `train_end`, and no training label window
  reaches past it. `leave_one_out`: the last event of each user is the test target, the last but one the validation
  target. `user`: a hash assigns each user to a split, and every snapshot of a user belongs to the user's split.
  Vocabularies and statistics are then fitted on the training users' events only, and all label windows lie within the
  log.

  `gap_days` (mode `temporal`) is the least distance between the periods. Every validation snapshot lies at least this
  long after `train_end`, where the last training label window may end. Every test snapshot lies at least this long
  after the last validation snapshot, and validation label windows end at least this long before the first test
  snapshot. Only labels and snapshots keep out of a gap: later snapshots see its events as history, like all events
  before them.

  `snapshots` sets where training snapshots lie (with mode `user`, the snapshots of all users; `leave_one_out` has its
  own). `calendar`: at the same times for all users, `every_days` apart. `every_events`: just after every k-th event of
  a user in the training period. `end`: once, just after a user's last event in it. With `end` no future is left to ask
  about, so it suits user labels and tasks that ask at events. "Just after" is one microsecond after the event's time,
  so a snapshot sees all events at equal times together. Of several snapshots at one moment one is kept; the others are
  counted. Validation and test snapshots of mode `temporal` stay at their times.
  """

  mode: Literal["temporal", "leave_one_out", "user"] = "temporal"
  train_start: str = ""  # earliest training snapshot; empty: `every_days` after the first event (calendar), or no bound
  train_end: str = ""
  snapshots: Literal["calendar", "every_events", "end"] = "calendar"
  every_days: float = 5.0  # calendar: distance, back from train_end; whole weeks would meet one weekday only
  every_events: int = 10  # every_events: k
  validation: tuple[str, ...] = ()  # snapshot times; empty (temporal): none, so that train_end may lie later
  test: tuple[str, ...] = ()  # empty (temporal): none, and validation windows may reach to the end of the log
  gap_days: float = 0.0
  log_end: str = ""  # time up to which the log is complete; empty: the last event's time (mode user: just after it)
  min_events: int = 1  # snapshots with fewer events before them are left out and counted
  user_validation: float = 0.1  # share of users (by hash) whose user labels are for validation
  user_test: float = 0.2  # the same for test; with mode user the shares hold out whole users

  def has_snapshots(self, split: str) -> bool:
    """Returns whether the split named train, validation or test has snapshots; the last two may be empty."""
    return split == "train" or self.mode != "temporal" or bool(getattr(self, split))


@dataclasses.dataclass(frozen=True)
class Data:
  """The event log, and the place of its prepared dataset."""

  path: str = ""  # dataset directory
  sources: Mapping[str, Source] = dataclasses.field(default_factory=dict)
  fields: Mapping[str, Field] = dataclasses.field(default_factory=dict)
  users: UserTable | None = None
  split: Split = Split()
  aggregates: Aggregates = dataclasses.field(default_factory=Aggregates)
  on_bad_rows: Literal["error", "drop"] = "error"  # rows without user or time, or with an unparsable value
  duplicates: Literal["keep", "drop"] = "keep"  # rows equal in user, time, source and every field
  memory: str = "2GB"  # DuckDB's memory; larger sorts spill to disk

  def type_field(self, source: str) -> str:
    """Returns the vocabulary field that reads the column `type` of a source; empty if there is none."""
    for name, field in self.fields.items():
      here = field.table == "events" and (not field.sources or source in field.sources)
      plain = field.kind == "vocabulary" and not field.buckets
      if here and plain and (field.column or name) == self.sources[source].type:
        return name
    return ""

  def typed(self, event_type: str) -> tuple[str, str, str]:
    """Returns the source, the field and the value of an event type, such as "buy" or "events.buy".

    Raises:
      ConfigError: no source, or more than one, can have the type.
    """
    typed = [n for n, s in self.sources.items() if s.type]
    name, dot, value = event_type.partition(".")
    if dot and name in typed:
      return name, self.type_field(name), value
    if len(typed) != 1:
      raise ConfigError(f"event type {event_type!r}: {len(typed)} sources have a column of types; write SOURCE.TYPE.")
    return typed[0], self.type_field(typed[0]), event_type

  @property
  def extra_value_fields(self) -> tuple[str, ...]:
    """Returns the fields of the further columns of an event's codes, which follow one column per categorical field."""
    return tuple(n for n, f in self.fields.items() if f.kind != "numeric" for _ in range(f.many - 1))


@dataclasses.dataclass(frozen=True)
class Model:
  """The sizes of the encoder. L is `max_events`, D `d_model`, E `experts`, K `experts_per_token`."""

  d_model: int = 64
  layers: int = 2
  heads: int = 4
  d_hidden: int = 256  # hidden width of the dense blocks' MLP
  moe_every: int = 2  # every n-th block holds experts instead of an MLP; 0: none
  experts: int = 8
  experts_per_token: int = 2
  d_expert: int = 128
  shared_experts: int = 0  # experts of width d_expert that every token visits in addition
  activation: Literal["gelu", "swiglu"] = "gelu"
  capacity_factor: float = 1.25  # for training only; evaluation and export never drop tokens
  dispatch: Literal["auto", "dense", "sorted", "all_to_all", "gather", "ragged"] = "auto"  # see layers/dispatch.py
  router_jitter: float = 0.0  # noise on the router's input in training
  dtype: Literal["float32", "bfloat16"] = "float32"  # type of matrix products; parameters, router and sums stay float32
  remat: Literal["none", "dots", "full"] = "none"  # recomputed in the backward pass; dots: all but products
  max_events: int = 256
  time_unit: Literal["seconds", "hours"] = "seconds"  # unit u of log(1 + gap / u) in all encodings of time gaps
  # Where aggregates enter. beside: all join z, the token reads all but counts of values, which heads read; token: the
  # token reads all, as in version 0.1.0.
  aggregates: Literal["beside", "token"] = "beside"
  dropout: float = 0.1
  value_dropout: float = 0.0  # in training each categorical value of an event is absent with this probability
  encoder: Literal["transformer", "gru"] = "transformer"  # gru: `layers` recurrent layers instead of blocks, no experts
  # Input of a task's head. none: the representation z. token: a token for each task and snapshot. mmoe, ple: the layers
  # of these models over z, with experts of their own.
  conditioning: Literal["none", "token", "mmoe", "ple"] = "none"
  task_ids: Literal["true", "shuffled"] = "true"  # token: the task that the router sees; shuffled is a control
  view_experts: int = 4  # mmoe, ple: experts that the tasks share
  task_experts: int = 1  # ple: each task's own
  view_hidden: int = 64  # mmoe, ple: hidden units of an expert
  ple_levels: int = 2


@dataclasses.dataclass(frozen=True)
class Mesh:
  """The number of devices along each mesh axis; 1×1×1 is one device."""

  data: int = 1
  expert: int = 1
  tensor: int = 1
  slices: int = 1  # TPU slices joined by a data-centre network; `data` spans them


@dataclasses.dataclass(frozen=True)
class Weighting:
  """The method that weights the tasks' losses; weights sum to the number of tasks. See `training/weighting`.

  `equal`: equal weights. `static`: the tasks' `weight`s. `uncertainty`: learned precisions. `famo`: weights that make
  all log losses fall at the same rate. `seesaw`: each task pulls on the encoder by the number of its labels, times its
  `weight`. `pcgrad`, `cagrad`: weights from the tasks' gradients at the representation, an approximation of those
  methods.
  """

  method: Literal["equal", "static", "uncertainty", "famo", "seesaw", "pcgrad", "cagrad"] = "static"
  learning_rate: float = 0.025  # uncertainty, famo: Adam's rate for the log weights
  weight_decay: float = 1e-3  # famo: decay of the log weights
  gradient_decay: float = dataclasses.field(default=0.9, metadata=ADDED_LATER)  # seesaw: of ‖g‖², per measurement
  labels_exponent: float = dataclasses.field(default=0.5, metadata=ADDED_LATER)  # seesaw: β; 0: all tasks pull alike
  c: float = 0.4  # cagrad: distance from the mean gradient, as a share of its length


@dataclasses.dataclass(frozen=True)
class Tables:
  """Storage and optimiser of embedding tables; a step changes only its batch's rows. See `training/table_step.py`."""

  optimizer: Literal["adagrad", "adam", "sgd"] = "adagrad"  # adagrad: a sum per row; adam: moments of touched rows
  learning_rate: float = 0.05  # peak; follows the schedule of `train.learning_rate`
  # adagrad: a row starts as if it had had this many updates, so that one that is seldom met moves little.
  prior_updates: float = 100.0
  weight_decay: float = 0.0  # decoupled; a row decays in the steps that touch it
  dtype: Literal["float32", "bfloat16"] = "float32"  # type of the rows; optimizer state stays float32
  rounding: Literal["nearest", "stochastic"] = "stochastic"  # rounding of bfloat16 rows
  cells: float = 2.0  # room in a device exchange, as a multiple of an even share; rows without room are counted


@dataclasses.dataclass(frozen=True)
class Validate:
  """Validation during training. See `evaluation/validation.py`."""

  every: int = 0  # steps between validations, a multiple of `train.checkpoint_every`; also at the last step; 0: never
  snapshots: int = 0  # largest number of snapshots, the same ones each time; 0: all
  metric: str = ""  # metric of the best checkpoint, "task/metric"; empty: mean of the main metrics by √labels
  checkpoints_kept: int = 1  # number of best checkpoints, kept in addition to the newest
  # A task whose main metric was best this many validations ago trains only its head from there on; 0: none does.
  task_patience: int = dataclasses.field(default=0, metadata=ADDED_LATER)


@dataclasses.dataclass(frozen=True)
class Train:
  """The settings of optimisation."""

  seed: int = 0
  steps: Steps = 1000  # "auto": rounds of training until validation gains nothing; see `config.rounds`
  batch_rows: int = 32
  snapshots_per_row: int = 8
  packing: bool = False  # several users share a row and its snapshots; see data/dataset/packing.py
  accumulate: int = 1  # micro-batches of a batch, differentiated one after the other to save memory
  steps_per_call: int = 1  # steps per call of the device, for models with short steps
  workers: int = 0  # processes that make batches (always the same batches); 0: threads of this process
  learning_rate: float = 1e-3
  warmup_steps: int = 50
  final_learning_rate: float = 0.02  # end of the cosine schedule, as a share of the peak
  weight_decay: float = 0.01
  tables: Tables = Tables()
  clip_norm: float = 1.0  # bound on the norm of all gradients, touched table rows included, for each active task
  balance_weight: float = 0.01
  z_weight: float = 1e-3
  task_information: float = 0.0  # γ: rewards mutual information of task and expert (conditioning="token")
  norm: Literal["rate", "batch", "sum"] = "rate"  # divisor of a task's summed loss: ρ·B, Σδω, or none
  missing: Literal["masked", "negative"] = "masked"  # negative: a control that treats unknown labels as 0
  weighting: Weighting = Weighting()
  user_folds: int = dataclasses.field(default=0, metadata=ADDED_LATER)  # see `data/dataset/user_folds.py`; 0: none
  user_fold: int = dataclasses.field(default=0, metadata=ADDED_LATER)  # the fold whose users of user labels are tested
  balance_rate: float = 0.0  # step size of the routers' bias (loss-free balancing, arXiv 2408.15664); 0: no bias
  checkpoint_every: int = 200
  checkpoints_kept: int = 2  # number of newest checkpoints
  validate: Validate = Validate()
  log_every: int = 20
  nonfinite_steps: int = 10  # steps with non-finite loss or gradients are skipped; a run stops at more than these
  hang_seconds: float = 600.0  # a run without a finished step for this long writes where it hangs and ends; 0: never
  mesh: Mesh = Mesh()


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """The settings of evaluation and embedding."""

  batch_rows: int = 64
  cutoffs: tuple[int, ...] = (5, 10)  # k of HR@k and NDCG@k
  catalogue_chunk: int = 8192  # number of values scored at a time in full ranking


@dataclasses.dataclass(frozen=True)
class Seesaw:
  """The runs of `supermoe seesaw`: single-task references and variants of this config, over several seeds.

  Variants and candidates are lists of overrides such as "train.weighting.method=seesaw". A task's single-task reference
  is the candidate of `single` that is best on validation, and every model tries the `rates`. The variant named in
  `tuned` gets the static weights that are best on validation among `static_candidates`: equal and random ones.
  """

  seeds: tuple[int, ...] = (0, 1, 2)  # the first seed also tunes
  variants: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # empty: the standard variants
  single: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # empty: this config with one task
  rates: tuple[float, ...] = (0.5, 1.0, 2.0)  # factors of both learning rates to try; (1.0,): nothing is tried
  null: bool = True  # trains the variant without overrides again with other seeds: what chance alone does
  user_folds: int = 5  # each seed tests another fold of the users of user labels; 0: all test the dataset's own
  tuned: str = "tuned_static"  # empty: no variant is tuned
  static_candidates: int = 8
  static_spread: float = 3.0  # weights are drawn log-uniformly from [1/spread, spread]


@dataclasses.dataclass(frozen=True)
class Config:
  """The settings of a whole run."""

  data: Data = Data()
  tasks: Mapping[str, Task] = dataclasses.field(default_factory=dict)
  exclude_tasks: tuple[str, ...] = ()  # names or globs; this run neither trains nor evaluates these tasks
  model: Model = Model()
  train: Train = Train()
  evaluate: Evaluate = Evaluate()
  seesaw: Seesaw = Seesaw()

  @property
  def labelled_tasks(self) -> dict[str, LabelledTask]:
    """Returns all tasks with labels, active or not, in the order of their names; preparation writes their labels."""
    return {n: cast(LabelledTask, t) for n, t in sorted(self.tasks.items()) if t.has_labels}

  @property
  def active_tasks(self) -> dict[str, Task]:
    """Returns the tasks of this run in the order of their names, because parameters depend on the order."""
    kept = sorted(n for n in self.tasks if not any(fnmatch.fnmatchcase(n, p) for p in self.exclude_tasks))
    return {n: self.tasks[n] for n in kept}

  @property
  def active_views(self) -> dict[str, LabelledTask]:
    """Returns the tasks of this run that have labels; each asks something of a user's representation."""
    return {n: cast(LabelledTask, t) for n, t in self.active_tasks.items() if t.has_labels}

  def data_identity(self) -> dict[str, Any]:
    """Returns the settings that preparation depends on: data without path and memory, and all tasks' labels."""
    return self._data_identity(to_dict(self))

  def _data_identity(self, whole: Mapping[str, Any]) -> dict[str, Any]:
    data = {k: v for k, v in whole["data"].items() if k not in ("path", "memory")}
    tasks = {n: {k: v for k, v in whole["tasks"][n].items() if k not in NOT_PREPARED} for n in self.labelled_tasks}
    return {"data": data, "tasks": tasks}

  def data_hash(self) -> str:
    """Returns a hash that identifies a preparation; a later version's settings count only if they are set."""
    return _hash_text(self._data_identity(to_dict(self, later=False)))

  def hash(self) -> str:
    """Returns a hash that identifies the whole configuration; a later version's settings count only if they are set."""
    return _hash_text(to_dict(self, later=False))


def _hash_text(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def parse_time(text: str, path: str) -> int:
  """Returns an ISO 8601 time in microseconds since 1970-01-01 UTC; a time without an offset is UTC.

  Raises:
    ConfigError: `text` is no time; the message names the key `path`.
  """
  try:
    moment = datetime.datetime.fromisoformat(text)
  except ValueError:
    raise ConfigError(f"{path}={text!r} is not a time; write it as 2017-10-01 or 2017-10-01T12:00:00.") from None
  if moment.tzinfo is None:
    moment = moment.replace(tzinfo=datetime.UTC)
  epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
  return (moment - epoch) // datetime.timedelta(microseconds=1)


def format_time(microseconds: int) -> str:
  """Returns the ISO 8601 text, in UTC and to the second, of a time in microseconds since 1970."""
  import numpy as np  # reading a config needs no NumPy

  return str(np.datetime64(int(microseconds), "us").astype("datetime64[s]"))


def _default(field: dataclasses.Field[Any]) -> Any:
  return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def to_dict(value: Any, *, later: bool = True) -> Any:
  """Returns resolved dataclasses as dicts, lists and scalars; unless `later`, without defaults of `ADDED_LATER`."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    given = [(f, getattr(value, f.name)) for f in dataclasses.fields(value)]
    shown = [(f.name, v) for f, v in given if later or f.metadata != ADDED_LATER or v != _default(f)]
    out = {name: to_dict(v, later=later) for name, v in shown}
    return {"kind": value.kind, **out} if type(value) in TASK_KINDS.values() else out  # type: ignore[attr-defined]
  if isinstance(value, Mapping):
    return {k: to_dict(v, later=later) for k, v in value.items()}
  if isinstance(value, (tuple, list)):
    return [to_dict(v, later=later) for v in value]
  return value
