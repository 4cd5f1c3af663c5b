"""What `inspect` finds, the roles it proposes, and that its config works."""

from __future__ import annotations

import datetime
import json

import pyarrow as pa
import pytest

from supermoe_jax import config
from supermoe_jax.data.inspect.column_roles import ColumnStatistics, field_role, user_candidates
from supermoe_jax.data.inspect.inspect import inspect
from supermoe_jax.data.preparation import fitting
from supermoe_jax.data.preparation.event_log import EventLog
from supermoe_jax.data.tasks.calendar import make_calendar
from supermoe_jax.errors import DataError
from tests.fixtures.event_rows import histories

JUNE_1 = config.parse_time("2020-06-01", "") // 1_000_000
N = 600


def log(**changes):
  """Two months of events of 20 users, ten a day, with a category, a rating, a price and ids of several kinds."""
  places = range(N)
  columns = {
    "user_id": [i % 20 for i in places],
    "item_id": [f"i{i * 7 % 50}" for i in places],
    "rating": [1 + i % 5 for i in places],
    "price": [0.25 + i * i % 97 for i in places],
    "timestamp": [JUNE_1 + i * 8_640 for i in places],
  }
  columns.update(changes)
  return {k: v for k, v in columns.items() if v is not None}


@pytest.fixture
def found(write):
  """Inspects one table; returns its findings."""

  def run(columns, name="log.parquet"):
    (table,) = inspect([str(write(name, columns))]).tables
    return table

  return run


def roles(table):
  return {c.name: r.kind for c, r in zip(table.columns, table.roles, strict=True)}


def reason(table, column):
  return next(r.reason for c, r in zip(table.columns, table.roles, strict=True) if c.name == column)


@pytest.fixture
def load(tmp_path):
  """Loads the config that files lead to."""

  def run(*files):
    file = tmp_path / "proposed.py"
    file.write_text(inspect([str(f) for f in files]).config)
    return config.load(str(file))

  return run


# ---------------------------------------------------------------------------------------------------------------- facts


def test_columns_are_measured_alike_in_every_format(name, found):
  table = found(log(rating=[None, *(1 + i % 5 for i in range(1, N))]), name)
  facts = {c.name: c for c in table.columns}
  assert table.rows == N
  assert (facts["rating"].present, facts["rating"].distinct) == (N - 1, 5)
  assert (facts["price"].low, facts["price"].high, facts["price"].whole) == (0.25, 96.25, False)
  assert facts["item_id"].sample[:3] == ("i0", "i7", "i14")
  expected = ["user", "vocabulary", "vocabulary", "numeric", "time"]
  assert roles(table) == dict(zip(log(), expected, strict=True))


def test_facts_of_events_are_counted(found):
  columns = {n: [*v, *v[:30]] for n, v in log().items()}
  events = found(columns).events
  assert (events.first, events.last) == (JUNE_1 * 1_000_000, (JUNE_1 + (N - 1) * 8_640) * 1_000_000)
  assert events.tie_rate == pytest.approx(60 / 630)
  assert events.duplicate_rate == pytest.approx(30 / 630)


def test_rows_per_user_are_counted(found):
  (user,) = found(log(user_id=[0] * 500 + [1] * 70 + [2] * 30)).users
  assert (user.column, user.users, user.median, user.most) == ("user_id", 3, 70, 500)


def test_files_of_the_same_columns_are_one_table(write):
  first, second = write("part-1.csv", log()), write("part-2.csv", dict(reversed(log().items())))
  (table,) = inspect([str(first), str(second)]).tables
  assert table.rows == 2 * N
  assert table.name == first.parent.name.replace("-", "_").lower() or table.name.isidentifier()


def test_an_empty_file_is_named(write, tmp_path):
  (tmp_path / "empty.csv").touch()
  found = inspect([str(write("log.csv", log())), str(tmp_path / "empty.csv")])
  assert found.empty_files == (tmp_path / "empty.csv",)
  assert "empty.csv" in found.render()


def test_files_without_any_row_are_an_error(tmp_path):
  (tmp_path / "empty.csv").touch()
  with pytest.raises(DataError, match=r"none of the 1 files holds a row"):
    inspect([str(tmp_path / "empty.csv")])


def test_a_missing_file_is_an_error(tmp_path):
  with pytest.raises(DataError, match=r"^/.*log\.csv: no such file"):
    inspect([str(tmp_path / "log.csv")])


# ---------------------------------------------------------------------------------------------------------------- roles


@pytest.mark.parametrize(
  ("times", "reason_given", "settings"),
  [
    ([JUNE_1 + i for i in range(N)], "epoch in s", {}),
    ([(JUNE_1 + i) * 1000 for i in range(N)], "epoch in ms", {"time_unit": "ms"}),
    ([(JUNE_1 + i) * 1_000_000 for i in range(N)], "epoch in us", {"time_unit": "us"}),
    ([f"2020-06-{1 + i // 60:02}T12:00:{i % 60:02}" for i in range(N)], "ISO 8601", {}),
    ([f"{1 + i // 60:02}.06.2020 12:{i % 60:02}" for i in range(N)], "dates as", {"time_format": "%d.%m.%Y %H:%M"}),
    ([20200601 + i // 60 for i in range(N)], "dates as %Y%m%d", {"time_format": "%Y%m%d"}),
  ],
)
def test_the_time_is_recognised_with_its_unit_or_format(times, reason_given, settings, found):
  table = found(log(timestamp=times), "log.csv")
  ((column, role),) = table.having("time")
  assert column.name == "timestamp" and role.reason.startswith(reason_given) and role.settings == settings
  assert config.parse_time("2020-06-01", "") <= table.events.first < config.parse_time("2020-06-02", "")


def test_integer_dates_are_recognised(found):
  ((_, role),) = found(log(timestamp=[20200601 + i // 60 for i in range(N)])).having("time")
  assert role.settings == {"time_format": "%Y%m%d"}


def test_timestamps_are_preferred_to_epochs(found):
  stamps = pa.array([datetime.datetime(2020, 6, 1) + datetime.timedelta(hours=i) for i in range(N)])
  table = found(log(happened=stamps))
  assert roles(table)["happened"] == "time"
  assert reason(table, "timestamp") == "another time"


def test_a_day_and_month_that_may_be_swapped_are_pointed_out(found):
  table = found(log(timestamp=[f"{1 + i % 12:02}/{1 + i // 60:02}/2020" for i in range(N)]))
  assert reason(table, "timestamp") == "dates as %d/%m/%Y; or %m/%d/%Y?"


@pytest.mark.parametrize("user", ["user", "visitorid", "CustomerID", "household_id", "uid", "hashed_user"])
def test_the_user_is_recognised_by_name(user):
  columns = [ColumnStatistics(n, "BIGINT", rows=99, present=99, distinct=9) for n in ("item_id", "user_segment", user)]
  assert user_candidates(columns, None) == [2]


def test_something_known_of_a_user_is_not_the_user(found):
  table = found(log(user_age=[20 + i % 60 for i in range(N)]))
  assert roles(table)["user_age"] == "numeric"
  assert [u.column for u in table.users] == ["user_id"]


def test_without_a_telling_name_the_first_ids_that_come_back_are_the_user(found):
  table = found({"a": log()["user_id"], "b": log()["item_id"], "timestamp": log()["timestamp"]})
  assert roles(table) == {"a": "user", "b": "vocabulary", "timestamp": "time"}


def test_columns_that_say_nothing_of_behaviour_are_left_out(found):
  columns = {
    "no value": pa.array([None] * N, pa.string()),
    "one value only": [7] * N,
    "a different value in each row": [f"event {i}" for i in range(N)],
    "each value belongs to one user: it identifies users": [f"basket {i % 20} {i // 40}" for i in range(N)],
    "long text": [f"{i % 30} " + "words " * 20 for i in range(N)],
    "nested values": [[[1, 2]]] * (N - 1) + [[[3]]],
  }
  table = found(log(**{f"c{i}": values for i, values in enumerate(columns.values())}))
  assert [reason(table, f"c{i}") for i in range(len(columns))] == list(columns)


def test_calendar_columns_are_left_out(found):
  assert roles(found(log(week=[i // 70 for i in range(N)])))["week"] == "ignore"


def test_numbers_that_are_ids_are_categories(found):
  table = found(log(product_id=[i * 31 % 211 for i in range(N)], quantity=[i * 31 % 211 for i in range(N)]))
  assert roles(table)["product_id"] == "vocabulary"
  assert roles(table)["quantity"] == "numeric"


def test_skewed_numbers_are_log1p(found):
  table = found(log(spent=[10_000.5 if i == 5 else 1.5 * (i % 7) for i in range(N)]))
  ((_, role),) = [(c, r) for c, r in table.having("numeric") if c.name == "spent"]
  assert role.settings == {"encoding": "log1p"}


def test_more_than_a_hundred_thousand_values_are_hashed():
  role = field_role(
    ColumnStatistics("item_id", "VARCHAR", rows=9_000_000, present=9_000_000, distinct=150_000, length=9.0)
  )
  assert (role.kind, role.settings) == ("hash", {"size": 262_144})


# --------------------------------------------------------------------------------------------------------------- config


def test_the_proposed_config_prepares_the_files(name, write, load, tmp_path):
  cfg = load(write(name, log()))
  assert set(cfg.tasks) == {"next_item_id", "churn", "days_to_events", "events_times", "item_id_soon", "price_sum"}
  assert cfg.data.fields["price"].kind == "numeric"
  scratch = tmp_path / "scratch"
  scratch.mkdir()
  with EventLog(cfg.data, scratch) as events:
    calendar = make_calendar(cfg.data.split, events.start, events.end)
    assert {*calendar.split.tolist()} == {0, 1, 2}
    assert 0.6 < events.counts["training_events"] / events.counts["events"] < 0.8
    assert len(histories(events, fitting.fit_encoders(events, cfg.data))) == 20


def test_a_log_of_a_few_seconds_still_has_a_temporal_split(write, load):
  split = load(write("log.csv", log(timestamp=[JUNE_1 + i // 10 for i in range(N)]))).data.split
  assert split.mode == "temporal" and 0 < split.every_days < 1e-3


def test_a_log_of_one_time_leaves_one_out(write, load):
  assert load(write("log.csv", log(timestamp=[JUNE_1] * N))).data.split.mode == "leave_one_out"


def test_a_glob_that_the_shell_expanded_is_written_as_a_glob(write, load, tmp_path):
  files = [write(f"events/part-{i}.csv", log()) for i in range(3)]
  (source,) = load(*files).data.sources.values()
  assert source.files == (f"{tmp_path}/events/*.csv",)
  (source,) = load(*files[:2]).data.sources.values()
  assert source.files == tuple(str(f) for f in files[:2])


def test_tables_of_items_and_users_are_joined(write, load):
  items = {"item_id": [f"i{i}" for i in range(50)], "brand": ["A", "B"] * 25}
  people = {"user_id": range(20), "gender": ["F", "M"] * 10}
  data = load(write("log.parquet", log()), write("items.csv", items), write("users.csv", people)).data
  assert data.sources["log"].items.key == "item_id"
  assert "brand" in data.fields
  assert data.users is not None and data.users.user == "user_id"


@pytest.mark.parametrize("values", ["lists", "objects"])
def test_the_config_of_sequences_and_a_json_object_prepares_them(values, load, tmp_path):
  (tmp_path / "log.txt").write_text(
    "".join(f"u{u} {' '.join(f'i{u * k % 50}' for k in range(9))}\n" for u in range(40))
  )
  lists = {f"i{i}": [i % 3, i % 5, *range(i % 12)] for i in range(50)}
  objects = {key: {"brand": v[0], "tags": v} for key, v in lists.items()}
  (tmp_path / "items.json").write_text(json.dumps(lists if values == "lists" else objects))
  cfg = load(tmp_path / "log.txt", tmp_path / "items.json")
  assert list(cfg.tasks) == ["next_item"] and cfg.data.split.mode == "leave_one_out"
  assert cfg.train.steps == "auto"
  assert not cfg.data.aggregates.enabled
  expected = {"lists": {"item": 0, "values": 8}, "objects": {"item": 0, "brand": 0, "tags": 8}}[values]
  assert {name: field.many for name, field in cfg.data.fields.items()} == expected
  scratch = tmp_path / "scratch"
  scratch.mkdir()
  with EventLog(cfg.data, scratch) as events:
    assert events.counts["events"] == 360 and events.counts["sources"]["log"]["items_missing"] == 0
    assert len(histories(events, fitting.fit_encoders(events, cfg.data))) == 40


def test_lists_in_json_lines_are_fields_of_many_but_not_what_is_predicted(load, write):
  tags = [[f"t{k}" for k in range(i % 4)] for i in range(N)]
  cfg = load(write("log.jsonl", log(item_id=tags, shop=[f"s{i % 7}" for i in range(N)])))
  assert cfg.data.fields["item_id"].many == 3
  assert "next_item_id" not in cfg.tasks


@pytest.mark.parametrize(
  ("type", "value"), [(pa.string(), "t{}".format), (pa.int64(), int), (pa.uint16(), int), (pa.int8(), int)]
)
def test_lists_of_parquet_are_fields_of_many_that_keep_most_of_them_whole(type, value, write, load, tmp_path):
  # 30 of 602 lists are longer than three, and two hold no value at all.
  lengths = [12 if i % 20 == 0 else 1 + i % 3 for i in range(N)] + [0, None]
  tags = pa.array([None if n is None else [value(k) for k in range(n)] for n in lengths], pa.list_(type))
  columns = log(shop=[f"s{i % 7}" for i in range(N)])
  columns = {k: [*v, v[0], v[1]] for k, v in columns.items()} | {"tags": tags}
  file = write("log.parquet", pa.table(columns))
  kept = sum(min(n or 0, 3) for n in lengths) / sum(n or 0 for n in lengths)
  comment = f"5 different lists; many=3 keeps {kept:.1%} of their values"
  assert f'"tags": {{"many": 3}},  # {comment}\n' in inspect([str(file)]).config
  cfg = load(file)
  assert cfg.data.fields["tags"] == config.Field(many=3) and "next_tags" not in cfg.tasks
  (tmp_path / "scratch").mkdir()
  with EventLog(cfg.data, tmp_path / "scratch") as events:
    assert fitting.fit_encoders(events, cfg.data).categorical["tags"].values == [str(value(k)) for k in range(3)]


def test_a_field_of_many_keeps_no_more_than_eight_values(write, load):
  tags = [[str(k) for k in range(9 + i % 2)] for i in range(N)]
  assert load(write("log.parquet", log(tags=tags))).data.fields["tags"].many == 8


@pytest.mark.parametrize(
  "values",
  [
    [[0.5, 1.5], [2.5]] * (N // 2),
    [[datetime.date(2020, 1, 1)], [datetime.date(2020, 1, 2)]] * (N // 2),
    pa.array([[], None] * (N // 2), pa.list_(pa.string())),
    [["one", "value"]] * N,
  ],
)
def test_lists_of_other_values_or_that_say_nothing_are_left_out(values, found):
  assert roles(found(log(tags=values)))["tags"] == "ignore"


def test_lists_of_a_parquet_table_of_items_are_fields_of_many(write, load):
  items = {"item_id": [f"i{i}" for i in range(50)], "genres": [["A", "B"][: 1 + i % 2] for i in range(50)]}
  data = load(write("log.parquet", log()), write("items.parquet", items)).data
  assert data.sources["log"].items.key == "item_id" and data.fields["genres"].many == 2


def test_text_that_looks_like_a_list_is_one_value_where_it_is_read_so(found):
  table = found(log(tags=["[1, 2]", "[3]"] * (N // 2)), "log.csv")
  ((_, role),) = [(c, r) for c, r in table.having("vocabulary") if c.name == "tags"]
  assert not role.settings


def test_lines_of_sequences_that_cannot_be_used_are_named(tmp_path):
  (tmp_path / "log.txt").write_text("u1 x\nu1 y\n")
  with pytest.raises(DataError, match=r"log\.txt line 1 and .*log\.txt line 2: the user 'u1' has 2 lines"):
    inspect([str(tmp_path / "log.txt")])


def test_sequences_are_rendered_without_a_calendar(tmp_path):
  (tmp_path / "log.txt").write_text("u1 x y z\nu2 x\n")
  assert "time      none, only an order: positions up to 3" in inspect([str(tmp_path / "log.txt")]).render()


def test_two_sources_share_fields_of_the_same_column(write, load):
  views = log(price=None, rating=None, seconds=[i * 3 % 101 for i in range(N)])
  data = load(write("buys.csv", log(rating=None)), write("views.csv", views)).data
  assert list(data.sources) == ["buys", "views"]
  assert data.fields["item_id"].sources == ()
  assert data.fields["price"].sources == ("buys",)
  assert data.fields["seconds"].sources == ("views",)


def test_rows_that_cannot_be_read_are_proposed_to_be_dropped(write, load):
  user = [None, *log()["user_id"][1:]]
  assert load(write("log.csv", log(user_id=user))).data.on_bad_rows == "drop"


def test_names_that_are_no_identifiers_become_fields_all_the_same(write, load):
  columns = log()
  columns["item's name"] = columns.pop("item_id")
  data = load(write("2020.csv", columns)).data
  assert data.fields["item_s_name"].column == "item's name"
  assert list(data.sources) == ["events_2020"]


def test_without_a_time_no_config_is_proposed(write):
  found = inspect([str(write("log.csv", log(timestamp=None)))])
  assert found.config == "" and "No config is proposed" in found.render()


def test_the_findings_are_aligned_and_hold_the_config(write):
  text = inspect([str(write("log.csv", log()))]).render()
  header, *rows = [line for line in text.splitlines() if line.startswith("  ")][:6]
  at = header.index("role")
  assert all(row[at - 1] == " " and row[at] != " " for row in rows)
  assert "def get_config()" in text and "ties" in text
