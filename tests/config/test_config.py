import copy
import pathlib

import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.errors import ConfigError
from tests.fixtures.small_log import raw_config


@pytest.fixture
def raw(tmp_path: pathlib.Path) -> dict:
  return raw_config(tmp_path)


def changed(raw: dict, key: str, value: object) -> dict:
  out = copy.deepcopy(raw)
  node = out
  *parents, last = key.split(".")
  for parent in parents:
    node = node.setdefault(parent, {})
  node[last] = value
  return out


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("train.stepz", 3, r"config\.train\.stepz: unknown key; did you mean 'steps'\?"),
    ("train.steps", "many", r"config\.train\.steps='many' must be of type int, or 'auto'"),
    ("train.steps", True, r"config\.train\.steps=True must be of type int"),
    ("model.d_model", 18, r"d_model=18 must be a multiple of 2 × heads=4"),
    ("model.experts_per_token", 9, r"experts_per_token=9 exceeds experts=4"),
    ("model.moe_every", 3, r"moe_every=3 exceeds layers=2"),
    ("train.warmup_steps", 12, r"warmup_steps=12 must be less than steps=12"),
    ("train.mesh.expert", 8, r"experts=4 must be a multiple of train\.mesh\.expert=8"),
    ("train.mesh.tensor", 3, r"d_expert=16 must be a multiple of train\.mesh\.tensor=3"),
    ("train.mesh.slices", 2, r"mesh\.data=1 must be a multiple of slices=2"),
    ("model.router_jitter", 1.0, r"router_jitter=1\.0 must be in \[0, 1\)"),
    ("train.balance_rate", -0.1, r"balance_rate=-0\.1 must not be negative"),
    ("train.mesh.data", 3, r"batch_rows=8 must be a multiple of mesh\.data × mesh\.expert=3"),
    ("tasks.next_page.field", "pgae", r"tasks\.next_page\.field='pgae' is not a vocabulary field; did you mean 'page'"),
    ("tasks.next_page.field", "device", r"'device' is not a vocabulary field"),
    ("tasks.quiet.source", "visit", r"'visit' is not a source; did you mean 'visits'"),
    ("tasks.quiet.kind", "futur_event", r"did you mean 'future_event'"),
    ("tasks.quiet.horizon_days", 0, r"horizon_days=0\.0 must be positive"),
    ("tasks.t", {"kind": "time_to_event", "intervals": 0}, r"intervals=0 must be positive"),
    ("tasks.t", {"kind": "time_to_event", "horizon_days": 1e-10}, r"are too many for horizon_days=1e-10"),
    (
      "tasks.t",
      {"kind": "time_to_event", "edges_days": [1, 7]},
      r"end at horizon_days=28, not at 7; append 28, or set",
    ),
    ("tasks.t", {"kind": "time_to_event", "edges_days": [9, 7, 28]}, r"edges_days=.* must be positive and ascend"),
    (
      "tasks.t",
      {"kind": "time_to_event", "edges_days": [28], "intervals": 4},
      r"intervals=4 has no meaning with edges",
    ),
    ("tasks.paid.positive", [], r"tasks\.paid\.positive is empty"),
    ("exclude_tasks", ["churn*"], r"'churn\*' matches no task"),
    ("exclude_tasks", ["*"], r"leaves no task"),
    ("data.fields.page.sources", ["visitz"], r"no source named 'visitz'; did you mean 'visits'"),
    ("data.fields.page.kind", "vocab", r"'vocab' is not a choice; did you mean 'vocabulary'"),
    ("data.split.train_end", "yesterday", r"train_end='yesterday' is not a time"),
    (
      "data.split.validation",
      ["2024-04-01"],
      r"validation: 2024-04-01 lies before the end of the period that precedes it",
    ),
    (
      "data.split.gap_days",
      2.0,
      r"validation: 2024-05-02 lies less than gap_days=2 after the end .*lower config\.data\.split\.gap",
    ),
    ("data.split.gap_days", -1.0, r"gap_days=-1\.0 must not be negative"),
    ("data.split.mode", "user", r"split\.(train_end|validation|test) has no meaning with mode='user'; remove it"),
    ("data.split", {"mode": "user", "gap_days": 1.0}, r"gap_days has no meaning with mode='user'"),
    ("data.split", {"mode": "user", "user_test": 0.0}, r"user_test=0\.0 leaves no user for test"),
    ("data.split", {"mode": "user", "snapshots": "end"}, r"no event follows a snapshot|nothing follows a training"),
    ("data.split.snapshots", "end", r"tasks\.\w+: with .*snapshots='end' nothing follows a training snapshot"),
    ("data.split.snapshots", "each_event", r"'each_event' is not a choice; did you mean 'every_events'"),
    ("model.conditioning", "gate", r"conditioning='gate': version 0.2.0 has no gates.*Set 'none', or read"),
    ("train.weighting.method", "dwa", r"method='dwa': version 0.2.0 has no dynamic weight average.*Set 'equal'"),
    ("data.split.every_events", 0, r"every_events=0 must be positive"),
    ("data.split.mode", "leave_one_out", r"needs config\.data\.split\.mode='temporal'|no meaning with mode"),
    ("data.aggregates.fields", ["device"], r"'device' is not a vocabulary field"),
    ("data.users", None, r"config\.data\.fields\.town\.table='users' needs config\.data\.users"),
    ("data.fields.page.buckets", -1, r"fields\.page\.buckets=-1 must not be negative"),
    ("data.fields.hashed", {"kind": "hash", "buckets": 9}, r"hashed\.buckets=9 has no meaning with kind='hash'"),
    ("data.fields.number", {"kind": "numeric", "buckets": 9}, r"number\.buckets=9 has no meaning for numbers"),
    (
      "tasks.next_page.field",
      "mixed",
      r"tasks\.next_page\.field='mixed': with .*mixed\.buckets=9 .*second field of the same column without buckets, "
      r"such as mixed_asked=dict\(column='page'\)",
    ),
    (
      "tasks.next_page",
      {"kind": "future_values", "field": "mixed", "horizon_days": 1.0},
      r"tasks\.next_page\.field='mixed': .* same column with input=False without buckets, such as "
      r"mixed_asked=dict\(column='page', input=False\)",
    ),
    (
      "tasks.next_page",
      {"kind": "event_label", "field": "mixed", "positive": ["a"]},
      r"tasks\.next_page\.field='mixed': .*input=False",
    ),
    ("data.aggregates.fields", ["town"], r"aggregates\.fields: 'town' is of the table of users.*; leave it out"),
    ("tasks.next_page.field", "town", r"tasks\.next_page\.field='town' is of the table of users .*kind 'user_label'"),
    ("tasks.pages.field", "town", r"tasks\.pages\.field='town' is of the table of users"),
    (
      "tasks.pages",
      {"kind": "event_label", "field": "town", "positive": ["a"]},
      r"tasks\.pages\.field='town' is of the table of users",
    ),
    (
      "data.fields.known",
      {"table": "users", "column": "plan"},
      r"tasks\.paid\.column='plan' is also the column of the input config\.data\.fields\.known.*known\.input=False",
    ),
    ("data.fields.plan", {"table": "users"}, r"tasks\.paid\.column='plan' is also .*config\.data\.fields\.plan,"),
    ("data.aggregates.fields", ["mixed"], r"aggregates\.fields: .*mixed\.buckets=9 lets values share codes; leave it"),
  ],
)
def test_an_impossible_config_names_the_key_and_the_remedy(raw: dict, key: str, value: object, message: str) -> None:
  raw["data"]["fields"] |= {"mixed": {"column": "page", "buckets": 9}, "town": {"table": "users"}}
  with pytest.raises(ConfigError, match=message):
    config.resolve(changed(raw, key, value))


def test_a_user_label_needs_a_table_of_users(raw: dict) -> None:
  with pytest.raises(ConfigError, match=r"a user label needs config\.data\.users"):
    config.resolve(changed(raw, "data.users", None))


def test_a_column_may_be_a_label_and_a_field_that_is_no_input(raw: dict) -> None:
  config.resolve(changed(raw, "data.fields.plan", {"table": "users", "input": False}))
  config.resolve(changed(raw, "data.fields.plan", {"sources": ["visits"]}))


def write(tmp_path: pathlib.Path, raw: dict) -> str:
  file = tmp_path / "small.py"
  file.write_text(f"import ml_collections\n\ndef get_config():\n  return ml_collections.ConfigDict({raw!r})\n")
  return str(file)


def test_overrides_take_the_type_of_the_value_they_replace(raw: dict, tmp_path: pathlib.Path) -> None:
  path = write(tmp_path, raw)
  cfg = config.load(
    path, ["--config.train.steps=99", "--config.tasks.quiet.negate=false", "--config.exclude_tasks=pa*"]
  )
  assert (cfg.train.steps, cfg.tasks["quiet"].negate, list(cfg.active_tasks)) == (99, False, ["next_page", "quiet"])


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--config.train.stepz=1", "config.train has no key 'stepz'; did you mean 'steps'"),
    ("--config.train.steps=few", "must be of type int, or .auto."),
    ("--config.train.batch_rows=few", "invalid literal"),
    ("--config.train.steps", "write overrides as"),
    ("--config.data.sources.visits.items=x", "can only be filled there"),
  ],
)
def test_a_wrong_override_is_an_error(raw: dict, tmp_path: pathlib.Path, argument: str, message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    config.load(write(tmp_path, raw), [argument])


def test_a_missing_config_file_names_the_nearest(raw: dict, tmp_path: pathlib.Path) -> None:
  write(tmp_path, raw)
  with pytest.raises(ConfigError, match=r"no such file as .*; did you mean 'small\.py'"):
    config.load(str(tmp_path / "smal.py"))


def test_a_config_that_fails_says_why(tmp_path: pathlib.Path) -> None:
  (tmp_path / "broken.py").write_text("def get_config():\n  return 1 / 0\n")
  with pytest.raises(ConfigError, match=r"broken\.py: ZeroDivisionError: division by zero"):
    config.load(str(tmp_path / "broken.py"))


def test_a_saved_config_comes_back_equal(raw: dict, tmp_path: pathlib.Path) -> None:
  cfg = config.resolve(raw)
  config.save(cfg, tmp_path / "config.json")
  assert config.load_json(tmp_path / "config.json") == cfg


OTHER_DATA = [
  ("tasks.quiet.horizon_days", 7.0),
  ("tasks.quiet.negate", False),
  ("tasks.quiet.source", "buys"),
  ("tasks.pages.top", 4),
  ("tasks.paid.positive", ["free"]),
  ("data.split.gap_days", 0.5),
  ("data.split.train_end", "2024-04-30"),
  ("data.split.min_events", 2),
  ("data.split.log_end", "2024-07-01"),
  ("data.sources.visits.time_unit", "s"),
  ("data.sources.visits.delimiter", ";"),
  ("data.sources.visits.null_values", ["NULL"]),
  ("data.fields.page.min_count", 2),
  ("data.fields.page.missing", "null"),
  ("data.fields.device.input", False),
  ("data.fields.seconds.encoding", "standardise"),
  ("data.duplicates", "drop"),
  ("data.on_bad_rows", "drop"),
  ("data.aggregates.top_values", 3),
]


def test_the_data_hash_is_of_what_preparation_depends_on_and_of_nothing_else(raw: dict) -> None:
  base = config.resolve(raw)
  for key, value in (
    ("data.path", "x"),
    ("data.memory", "1GB"),
    ("train.steps", 20),
    ("train.seed", 3),
    ("model.layers", 3),
    ("evaluate.batch_rows", 8),
    ("tasks.quiet.weight", 2.0),
    ("tasks.next_page.negatives", 5),
    ("exclude_tasks", ["quiet"]),
  ):
    other = config.resolve(changed(raw, key, value))
    assert other.data_hash() == base.data_hash(), key
    assert other.hash() != base.hash(), key
  hashes = {base.data_hash(), *(config.resolve(changed(raw, key, value)).data_hash() for key, value in OTHER_DATA)}
  assert len(hashes) == len(OTHER_DATA) + 1


def test_the_order_of_keys_changes_no_hash(raw: dict) -> None:
  def turned(value: object) -> object:
    return {k: turned(v) for k, v in reversed(value.items())} if isinstance(value, dict) else value

  one, other = config.resolve(raw), config.resolve(turned(raw))
  assert list(one.tasks) != list(other.tasks) and list(one.data.sources) != list(other.data.sources)
  assert (one.hash(), one.data_hash()) == (other.hash(), other.data_hash())


@pytest.mark.parametrize(
  ("text", "seconds"),
  [
    ("1970-01-02", 86_400),
    ("1970-01-02T01:00", 90_000),
    ("1970-01-01T00:00:01+00:00", 1),
    ("1970-01-01T02:00:01+02:00", 1),
    ("1969-12-31T19:00-05:00", 0),
    ("1969-12-31", -86_400),
    ("2024-02-29T23:59:59", 1_709_251_199),
  ],
)
def test_a_time_is_utc_unless_it_carries_an_offset(text: str, seconds: int) -> None:
  assert config.parse_time(text, "key") == seconds * 1_000_000


def test_a_dataset_is_read_whatever_models_its_version_had(cfg: config.Config) -> None:
  raw = config.to_dict(cfg)
  raw["model"]["conditioning"], raw["train"]["weighting"]["window"] = "gate", 20
  found = config.resolve_prepared(raw)
  assert found.data_identity() == cfg.data_identity() and found.data.path == cfg.data.path


def test_a_setting_of_a_later_version_changes_no_hash_while_it_has_its_default(raw: dict) -> None:
  base = config.resolve(raw)
  visits = {**raw["data"]["sources"]["visits"], "delimiter": "", "header": "auto", "columns": [], "decimal": "."}
  visits |= {"thousands": "", "null_values": [], "type": ""}
  same = config.resolve(changed(raw, "data.sources.visits", visits))
  assert (same.hash(), same.data_hash()) == (base.hash(), base.data_hash())
  saved = config.to_dict(base, later=False)["data"]["sources"]["visits"]
  assert not saved.keys() & {"delimiter", "header", "columns", "decimal", "thousands", "null_values", "type"}
  same = config.resolve(changed(raw, "data.fields.page.missing", "error"))
  assert (same.hash(), same.data_hash()) == (base.hash(), base.data_hash())
  assert "missing" not in config.to_dict(base, later=False)["data"]["fields"]["page"]
  assert config.to_dict(base)["data"]["fields"]["page"]["missing"] == "error"
  assert config.resolve(changed(raw, "data.sources.visits.decimal", ",")).data_hash() != base.data_hash()


@pytest.mark.parametrize("days", [0.01, 1.0, 28.0, 365.0])
def test_the_intervals_of_a_time_ascend_to_its_horizon_evenly_in_the_logarithm(days: float) -> None:
  edges = config.TimeToEvent(horizon_days=days).edges
  assert len(edges) == 16 and edges[-1] == days
  steps = np.diff(np.log1p(edges), prepend=0)
  np.testing.assert_allclose(steps, steps[0], rtol=1e-3)


@pytest.mark.parametrize(("text", "value"), [("False", False), ("True", True), ("auto", "auto")])
def test_a_header_may_be_overridden(cfg: config.Config, text: str, value: object) -> None:
  changes = [f"--config.data.sources.visits.header={text}", "--config.data.sources.visits.columns=('a','b')"]
  assert config.override(cfg, changes).data.sources["visits"].header is value
