"""The settings of a run as frozen dataclasses; the defaults stand here."""

from __future__ import annotations

import dataclasses
import datetime
import fnmatch
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, cast

from supermoe_jax.config.tasks import NOT_PREPARED, TASK_KINDS, LabelledTask, Task
from supermoe_jax.errors import ConfigError

MICROSECONDS_PER_DAY = 86_400_000_000


# --------------------------------------------------------------------------------------------------------------- data


@dataclasses.dataclass(frozen=True)
class ItemTable:
  """A table joined to the events of a source by `key`, such as product attributes."""

  file: str = ""
  key: str = ""  # the column of the events
  table_key: str = ""  # the same in the table, under another name; empty: `key`, of a JSON object keyed by id "key"
  format: Literal["auto", "parquet", "csv", "jsonl", "atomic", "json_object"] = "auto"


@dataclasses.dataclass(frozen=True)
class Source:
  """One kind of event: files of one layout. The name of the source is the event's type."""

  files: tuple[str, ...] = ()  # paths or globs
  format: Literal["auto", "parquet", "csv", "jsonl", "atomic", "sequences"] = "auto"  # auto: by the file's ending
  user: str = "user_id"
  time: str = "timestamp"
  time_unit: Literal["auto", "s", "ms", "us"] = "auto"  # of numeric times; auto: seconds, checked for plausibility
  time_format: str = ""  # strptime format of textual times; empty: ISO 8601, without an offset read as UTC
  items: ItemTable | None = None


@dataclasses.dataclass(frozen=True)
class Field:
  """A value carried by events: the model's vocabulary of what happened.

  With `buckets` a value outside the vocabulary has one of so many codes, by its hash, rather than the one code of all
  such values. These codes are learned from the values of training that the vocabulary leaves out, so `min_count` or
  `size` has to leave some. Such a field is an input only: nothing can be asked about it, and it is not counted.

  With `shares` a field has no vocabulary of its own but that of another, code for code, and both have one table: the
  item that was bought and the item that was shown, say.

  A hash of more buckets than one table can have rows, or of two hashes, is several fields of one column, whose
  embeddings add up; `config.hash_fields` writes them.

  With `table="users"` the column is one of the table of users, and every event of a user carries the user's value; it
  is absent where the user has no row, or no value in it. Such a column has no time, and the model sees it from the
  first event on: it must hold what was known from the start, such as the country of signing up. What was found out
  later, such as the lifetime value, leaks the future into every snapshot.
  """

  kind: Literal["vocabulary", "hash", "numeric"] = "vocabulary"
  column: str = ""  # empty: the field's own name
  table: Literal["events", "users"] = "events"  # users: `data.users`; events: a source's files, or its table of items
  sources: tuple[str, ...] = ()  # empty: every source; elsewhere the field is absent, which is not out-of-vocabulary
  size: int = 100_000  # vocabulary: most values kept, by count in the training period; hash: buckets
  min_count: int = 1  # vocabulary: rarer values become out-of-vocabulary
  buckets: int = 0  # vocabulary: codes that the values out of it are hashed into; 0: they share one
  part: int = 0  # hash: this field has the buckets of one of `parts` equal parts; a value of another is absent in it
  parts: int = 1
  half: Literal["lower", "upper"] = "lower"  # hash: the 64 bits of the value's MD5 that choose
  shares: str = ""  # vocabulary: the field whose vocabulary, fitted on its own values, and table this one has too
  # Of numeric: log1p is sign(x)·log(1+|x|), then standardised; quantile is the standard-normal quantile of the rank.
  encoding: Literal["log1p", "standardise", "quantile"] = "standardise"
  input: bool = True  # False: read for labels only, the model never sees it
  many: int = 0  # vocabulary, hash: the column holds lists, of which the first `many` values are kept; 0: single values
  separator: str = "|"  # of the values of such a list where the column is text


# Buckets that one table can have: codes are int32, and the largest and smallest ones say that there is no row.
MOST_ROWS = 2**31 - 2**24 - 4


@dataclasses.dataclass(frozen=True)
class UserTable:
  """Columns known of some users, such as demographics: the source of user labels and of fields with `table="users"`."""

  files: tuple[str, ...] = ()
  format: Literal["auto", "parquet", "csv", "jsonl", "atomic"] = "auto"
  user: str = "user_id"


@dataclasses.dataclass(frozen=True)
class Split:
  """How time and users are divided into training, validation and test.

  `temporal`: snapshots at fixed times; the training period ends at `train_end`, and no training label window reaches
  past it. `leave_one_out`: the last event of each user is the test target, the last but one validation. `user`: users
  are divided by hash, and every snapshot of a user belongs to the user's split; vocabularies and statistics are fitted
  on the training users' events only, and all label windows lie within the log.

  `gap_days` (mode `temporal`) is a distance between the periods: every validation snapshot lies at least so long after
  `train_end`, where the last training label window may end, and every test snapshot at least so long after the last
  validation snapshot; a label window of validation ends at least so long before the first test snapshot. Only labels
  and snapshots keep out of a gap: its events are history that later snapshots see, as all events before them.

  `snapshots` says where training snapshots lie (with mode `user` those of all users; `leave_one_out` has its own).
  `calendar`: at the same times for all users, `every_days` apart. `every_events`: just after every k-th event of a user
  in the training period. `end`: once, just after a user's last event in it; nothing is left to ask about the future,
  so it suits user labels, and tasks that ask at events. "Just after" is one microsecond after the event's time: events
  at equal times are seen together, and of snapshots that fall on one moment one is kept and the others are counted.
  Validation and test snapshots of mode `temporal` stay at their times.
  """

  mode: Literal["temporal", "leave_one_out", "user"] = "temporal"
  train_start: str = ""  # first training snapshot; empty: one `every_days` after the first event, or as soon as any
  train_end: str = ""
  snapshots: Literal["calendar", "every_events", "end"] = "calendar"
  every_days: float = (
    5.0  # calendar: distance of training snapshots, back from train_end; no multiple of a week meets all weekdays
  )
  every_events: int = 10  # every_events: k
  validation: tuple[str, ...] = ()
  test: tuple[str, ...] = ()
  gap_days: float = 0.0
  log_end: str = ""  # the log is complete up to here; empty: the time of the last event (mode user: just after it)
  min_events: int = 1  # a snapshot with fewer events before it is left out, and counted
  user_validation: float = 0.1  # share of users (by hash) whose user labels are held out for validation
  user_test: float = 0.2  # and for test; with mode user whole users are


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

  @property
  def extra_value_fields(self) -> tuple[str, ...]:
    """The field of each column of an event's codes that follows the first ones, which are one a categorical field."""
    return tuple(n for n, f in self.fields.items() if f.kind != "numeric" for _ in range(f.many - 1))


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
  encoder: Literal["transformer", "gru"] = "transformer"  # gru: `layers` recurrent layers instead of blocks, no experts
  # How a task's head sees a user. none: z itself. token: a token for each task and snapshot. gate: a gate for each task
  # over the last MoE layer's experts. mmoe, ple: those models' layers over z, with experts of their own.
  conditioning: Literal["none", "token", "gate", "mmoe", "ple"] = "none"
  task_ids: Literal["true", "shuffled"] = "true"  # token: what the router is told; shuffled is a control
  view_experts: int = 4  # mmoe, ple: experts that the tasks share
  task_experts: int = 1  # ple: each task's own
  view_hidden: int = 64  # mmoe, ple: hidden units of an expert
  ple_levels: int = 2


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices along each mesh axis; 1×1×1 is one device."""

  data: int = 1
  expert: int = 1
  tensor: int = 1
  slices: int = 1  # of TPU, joined by a data-centre network; `data` spans them


@dataclasses.dataclass(frozen=True)
class Weighting:
  """How the tasks' losses are weighed; weights sum to the number of tasks. See `training/weighting.py`.

  `equal`: all alike. `static`: the tasks' `weight`s. `uncertainty`: learned precisions. `dwa`: by how slowly a loss
  falls. `famo`: so that all log losses fall alike. `seesaw`: most to the task that is furthest behind what it reaches
  alone. `pcgrad`, `cagrad`: from the tasks' gradients at the representation, an approximation of those methods.
  """

  method: Literal["equal", "static", "uncertainty", "dwa", "famo", "seesaw", "pcgrad", "cagrad"] = "static"
  learning_rate: float = 0.025  # uncertainty, famo: of Adam on the log weights
  weight_decay: float = 1e-3  # famo: of the log weights
  window: int = 20  # dwa: steps that a loss is averaged over
  temperature: float = 2.0  # dwa
  decay: float = 0.98  # seesaw: of the moving average of a loss, a step
  mu: float = 1.0  # seesaw: large is plain log-loss balancing, 1 fixed weights π/R, small serves the worst task only
  warmup_steps: int = 50  # seesaw: the losses at their end are the references, where none is given
  references: Mapping[str, float] = dataclasses.field(default_factory=dict)  # seesaw: loss alone, over b
  c: float = 0.4  # cagrad: how far from the mean gradient, as a share of its length


@dataclasses.dataclass(frozen=True)
class Tables:
  """How embedding tables are kept and learned: only the rows that a batch touches move. See `training/tables.py`."""

  optimizer: Literal["adagrad", "adam", "sgd"] = "adagrad"  # adagrad: one sum a row; adam: moments of touched rows only
  learning_rate: float = 0.05  # peak; it follows the schedule of `train.learning_rate`
  weight_decay: float = 0.0  # of a row in the steps that touch it, decoupled
  dtype: Literal["float32", "bfloat16"] = "float32"  # of the rows; what is learned from them stays float32
  rounding: Literal["nearest", "stochastic"] = "stochastic"  # of bfloat16 rows
  cells: float = 2.0  # room in an exchange between devices, as a multiple of an even share; what finds none is counted


@dataclasses.dataclass(frozen=True)
class Validate:
  """Validation while a run trains. See `evaluation/validation.py`."""

  every: int = 0  # steps, a multiple of `train.checkpoint_every`; the last step too; 0: never
  snapshots: int = 0  # at most so many, the same ones each time; 0: all
  metric: str = ""  # what "best" means, as "task/metric"; empty: the mean of all tasks' main metrics (R² for RMSE)
  checkpoints_kept: int = 1  # the best ones, beside the newest


@dataclasses.dataclass(frozen=True)
class Train:
  """Optimisation."""

  seed: int = 0
  steps: int = 1000
  batch_rows: int = 32
  snapshots_per_row: int = 8
  packing: bool = False  # rows hold as many users as fit, who share the row's snapshots; see data/packing.py
  accumulate: int = 1  # parts of a batch that are differentiated one after the other, to spare memory
  steps_per_call: int = 1  # steps that the device makes without a word of the host, for models whose steps are short
  workers: int = 0  # processes that make batches, the same ones with any number; 0: threads of the training process
  learning_rate: float = 1e-3
  warmup_steps: int = 50
  final_learning_rate: float = 0.02  # share of the peak that the cosine schedule ends on
  weight_decay: float = 0.01
  tables: Tables = Tables()
  clip_norm: float = 1.0  # of all gradients together, those of touched rows included
  balance_weight: float = 0.01
  z_weight: float = 1e-3
  task_information: float = 0.0  # γ: raises the mutual information of task and expert (conditioning="token")
  norm: Literal["rate", "batch", "sum"] = "rate"  # what a task's summed loss is divided by: ρ·B, Σδω, or nothing
  missing: Literal["masked", "negative"] = "masked"  # negative: a control that takes unknown labels for 0
  weighting: Weighting = Weighting()
  balance_rate: float = 0.0  # step of the routers' balancing bias (loss-free balancing, arXiv 2408.15664); 0: no bias
  checkpoint_every: int = 200
  checkpoints_kept: int = 2  # the newest ones
  validate: Validate = Validate()
  log_every: int = 20
  nonfinite_steps: int = 10  # a step whose loss or gradients are not finite is skipped; a run stops at more than these
  hang_seconds: float = 600.0  # without a step done after which a run writes where it hangs, and ends; 0: never
  mesh: Mesh = Mesh()


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """Evaluation and embedding."""

  batch_rows: int = 64
  cutoffs: tuple[int, ...] = (5, 10)  # k of HR@k and NDCG@k
  catalogue_chunk: int = 8192  # values scored at a time in full ranking


@dataclasses.dataclass(frozen=True)
class Seesaw:
  """What `supermoe seesaw` runs: single-task references and variants of this config, over seeds.

  Variants and candidates are lists of overrides such as "train.weighting.method=seesaw". A task's single-task reference
  is the candidate of `single` that is best on validation. Static weights are tuned for the variant named in `tuned`:
  the best on validation of `static_candidates` weightings, equal weights and random ones.
  """

  seeds: tuple[int, ...] = (0, 1, 2)  # the first one also tunes
  variants: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # empty: the standard ones
  single: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # empty: this config, one task
  tuned: str = "tuned_static"  # empty: none is tuned
  static_candidates: int = 8
  static_spread: float = 3.0  # weights are drawn log-uniformly from [1/spread, spread]


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run."""

  data: Data = Data()
  tasks: Mapping[str, Task] = dataclasses.field(default_factory=dict)
  exclude_tasks: tuple[str, ...] = ()  # names or globs of tasks that this run neither trains nor evaluates
  model: Model = Model()
  train: Train = Train()
  evaluate: Evaluate = Evaluate()
  seesaw: Seesaw = Seesaw()

  @property
  def labelled_tasks(self) -> dict[str, LabelledTask]:
    """The tasks that have labels, active or not, in the order of their names: what preparation writes."""
    return {n: cast(LabelledTask, t) for n, t in sorted(self.tasks.items()) if t.has_labels}

  @property
  def active_tasks(self) -> dict[str, Task]:
    """The tasks of this run in the order of their names, whatever that of the config: parameters depend on it."""
    kept = sorted(n for n in self.tasks if not any(fnmatch.fnmatchcase(n, p) for p in self.exclude_tasks))
    return {n: self.tasks[n] for n in kept}

  @property
  def active_views(self) -> dict[str, LabelledTask]:
    """The tasks of this run that ask something of a user's representation: those with labels."""
    return {n: cast(LabelledTask, t) for n, t in self.active_tasks.items() if t.has_labels}

  def data_identity(self) -> dict[str, Any]:
    """What preparation depends on: the data section (but for its path and memory) and all tasks' labels."""
    whole = to_dict(self)
    data = {k: v for k, v in whole["data"].items() if k not in ("path", "memory")}
    tasks = {n: {k: v for k, v in whole["tasks"][n].items() if k not in NOT_PREPARED} for n in self.labelled_tasks}
    return {"data": data, "tasks": tasks}

  def data_hash(self) -> str:
    """Identifies a preparation."""
    return _hash_text(self.data_identity())

  def hash(self) -> str:
    """Identifies the whole configuration."""
    return _hash_text(to_dict(self))


def _hash_text(value: Any) -> str:
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


def format_time(microseconds: int) -> str:
  """Returns the ISO 8601 text, in UTC and to the second, of a time in microseconds since 1970."""
  import numpy as np  # reading a config needs no NumPy

  return str(np.datetime64(int(microseconds), "us").astype("datetime64[s]"))


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
