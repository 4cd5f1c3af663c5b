"""What `inspect` proposes for lists in text, members of objects, and numbers that are ids."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import config
from supermoe_jax.data.inspect.inspect import inspect
from supermoe_jax.data.preparation import fitting
from supermoe_jax.data.preparation.event_log import EventLog
from tests.fixtures.event_rows import JUNE_1

N = 600
TAGS = ["Drama", "Comedy", "Film-Noir", "War"]


def log(**columns):
  """Two months of events of 20 users."""
  shop = [f"s{i % 7}" for i in range(N)]
  return {"user_id": [i % 20 for i in range(N)], "at": [JUNE_1 + i * 8_640 for i in range(N)], "shop": shop, **columns}


@pytest.fixture
def proposed(write, tmp_path):
  """Inspects a file; returns the config that is proposed, and the role and the reason of each column."""

  def run(*files):
    found = inspect([str(f) for f in files])
    (tmp_path / "proposed.py").write_text(found.config)
    table = found.tables[0]
    roles = {c.name: (r.kind, r.reason) for c, r in zip(table.columns, table.roles, strict=True)}
    return config.load(str(tmp_path / "proposed.py")), roles

  return run


def lists(separator):
  return [separator.join(TAGS[k] for k in range(4) if (1 + i % 15) >> k & 1) for i in range(N)]


@pytest.mark.parametrize(("separator", "setting"), [("|", "|"), (" | ", "|"), (";", ";"), (", ", ",")])
def test_lists_in_text_are_fields_of_many(separator, setting, name, write, proposed, tmp_path):
  cfg, _ = proposed(write(name, log(genres=lists(separator))))
  assert cfg.data.fields["genres"] == config.Field(many=4, separator=setting)
  (tmp_path / "scratch").mkdir()
  with EventLog(cfg.data, tmp_path / "scratch") as events:
    assert {*fitting.fit_encoders(events, cfg.data).categorical["genres"].values} == {*TAGS}


@pytest.mark.parametrize(
  "values",
  [
    [f"How to {i % 50} | Videos {i % 50}" for i in range(N)],
    [f"Town {i % 50}, Country {i % 50 // 3}" for i in range(N)],
    [f"{i % 30},{i % 7}5" for i in range(N)],
    ["a|b" if i == 5 else f"v{i % 9}" for i in range(N)],
  ],
)
def test_text_whose_parts_do_not_recur_is_one_value(values, write, proposed):
  cfg, _ = proposed(write("log.tsv", log(title=values)))
  assert cfg.data.fields["title"].many == 0


def test_columns_of_lists_of_recbole_are_fields_of_many(tmp_path, write, proposed):
  file = write("log.inter", log(genres=lists(" ")))
  file.write_text(file.read_text().replace("genres:token", "genres:token_seq"))
  items = tmp_path / "log.item"
  words = "".join(f"s{i}\t{' '.join(['red', 'blue'][: 1 + i % 2])}\n" for i in range(7))
  items.write_text("shop:token\tcolours:token_seq\n" + words)
  cfg, _ = proposed(file, items)
  assert {n: f.many for n, f in cfg.data.fields.items()} == {"shop": 0, "genres": 4, "colours": 2}
  assert cfg.data.fields["genres"].separator == cfg.data.fields["colours"].separator == " "
  (tmp_path / "scratch").mkdir()
  with EventLog(cfg.data, tmp_path / "scratch") as events:
    encoders = fitting.fit_encoders(events, cfg.data).categorical
    assert {*encoders["genres"].values} == {*TAGS} and {*encoders["colours"].values} == {"red", "blue"}


@pytest.mark.parametrize("file_name", ["log.parquet", "log.jsonl"])
def test_members_of_objects_are_columns(file_name, write, proposed, tmp_path):
  props = [{"sku": f"k{i % 9}", "deep": {"price": 0.5 + i % 97}, "tags": TAGS[: 1 + i % 3]} for i in range(N)]
  cfg, roles = proposed(write(file_name, log(props=props)))
  assert cfg.data.fields["props_sku"] == config.Field(column="props.sku")
  assert cfg.data.fields["props_tags"] == config.Field(column="props.tags", many=3)
  assert cfg.data.fields["props_deep_price"] == config.Field(column="props.deep.price", kind="numeric")
  assert "props" not in roles
  (tmp_path / "scratch").mkdir()
  with EventLog(cfg.data, tmp_path / "scratch") as events:
    assert len(fitting.fit_encoders(events, cfg.data).categorical["props_sku"].values) == 9


def test_members_of_objects_in_a_json_object_of_items_are_columns(write, proposed, tmp_path):
  items = {f"s{i}": {"size": {"w": i % 3, "unit": "cm"}, "brand": f"b{i % 2}"} for i in range(7)}
  (tmp_path / "items.json").write_text(json.dumps(items))
  cfg, _ = proposed(
    write("log.csv", log(item=[f"s{i % 7}" for i in range(N)], shop=["a"] * N)), tmp_path / "items.json"
  )
  assert cfg.data.fields["size_w"].column == "size.w"
  (tmp_path / "scratch").mkdir()
  with EventLog(cfg.data, tmp_path / "scratch") as events:
    assert len(fitting.fit_encoders(events, cfg.data).categorical["size_w"].values) == 3


@pytest.mark.parametrize("file_name", ["log.csv", "log.jsonl"])
def test_objects_that_are_no_columns_are_left_out(file_name, write, proposed):
  many = [{f"k{i * 100 + k}": 1 for k in range(100)} for i in range(N)]
  held = [json.dumps(m) for m in many] if file_name.endswith("csv") else many
  assert proposed(write(file_name, log(props=held)))[1]["props"] == ("ignore", "nested values")


BASKET = [i // 4 for i in range(N)]  # of several users


@pytest.mark.parametrize(
  "values",
  [
    pytest.param([489_434 + b * 600 % 90_000 for b in BASKET], id="large numbers of one size"),
    pytest.param([f"C{489_434 + b}" if i == 7 else str(5 * b) for i, b in enumerate(BASKET)], id="one is a code"),
    pytest.param([f"{b % 300:05}" for b in BASKET], id="zeros before them"),
    pytest.param([10**18 + b for b in BASKET], id="integers beyond a double"),
    pytest.param(list(range(1, N + 1)), id="a number of the row"),
  ],
)
@pytest.mark.parametrize("file_name", ["log.csv", "log.parquet"])
def test_numbers_that_are_ids_by_their_values_are_no_quantities(values, file_name, write, proposed):
  cfg, roles = proposed(write(file_name, log(x=values)))
  assert roles["x"][0] == ("ignore" if values[-1] == N else "vocabulary")
  assert cfg.data.on_bad_rows == "error"


@pytest.mark.parametrize("column", ["Invoice", "InvoiceNo", "order_number", "booking", "ticket_ref", "orderid"])
def test_numbers_that_are_ids_by_their_name_are_no_quantities(column, write, proposed):
  _, roles = proposed(write("log.parquet", log(**{column: [1 + i * 31 % 211 for i in range(N)]})))
  assert roles[column] == ("vocabulary", "numbers that are ids")


@pytest.mark.parametrize("column", ["order_value", "orders", "visit_seconds", "number_of_views", "tickets_left"])
@pytest.mark.parametrize("least", [0, 150])
def test_quantities_stay_numbers(column, least, write, proposed):
  cfg, _ = proposed(write("log.parquet", log(**{column: [least + i * 31 % 211 for i in range(N)]})))
  assert cfg.data.fields[column].kind == "numeric"


def test_a_quantity_with_bad_text_stays_a_number(write, proposed):
  values = ["5 kg" if i == 7 else str(i % 50) for i in range(N)]
  cfg, _ = proposed(write("log.csv", log(weight=values)))
  assert cfg.data.fields["weight"].kind == "numeric" and cfg.data.on_bad_rows == "drop"


def test_numbers_of_which_each_belongs_to_one_user_are_left_out(write, proposed):
  invoices = pa.array([489_434 + 20 * (i // 60) + i % 20 for i in range(N)])
  assert proposed(write("log.parquet", log(invoice=invoices)))[1]["invoice"][1].startswith("each value belongs to one")


def embeddings(size=8):
  return [[(i % 40) * 0.5 + k for k in range(size)] for i in range(N)]


@pytest.mark.parametrize("name", ["e.parquet", "e.jsonl", "e.csv"])
def test_lists_of_numbers_of_one_length_are_a_vector_and_no_field_of_many(name, write, proposed, tmp_path):
  columns = log(face=[json.dumps(v) for v in embeddings()] if name == "e.csv" else embeddings())
  cfg, roles = proposed(write(name, columns))
  assert roles["face"] == ("vector", "lists of 8 numbers, such as an embedding")
  assert cfg.data.fields["face"] == config.Field(kind="vector", size=8)
  (tmp_path / "scratch").mkdir()
  with EventLog(cfg.data, tmp_path / "scratch") as events:
    assert fitting.fit_encoders(events, cfg.data).categorical["face"].n_codes == 42


@pytest.mark.parametrize(
  "lists",
  [
    embeddings(7),
    [v[: 8 + i % 2] for i, v in enumerate(embeddings(9))],
    [[float(round(x)) for x in v] for v in embeddings()],
    [v if i else [float("inf"), *v[1:]] for i, v in enumerate(embeddings())],
  ],
  ids=["short", "of several lengths", "whole numbers", "infinite"],
)
def test_other_lists_of_numbers_are_no_vectors(lists, proposed, tmp_path):
  file = tmp_path / "e.parquet"
  pq.write_table(pa.table(log(face=lists)), file)
  assert proposed(file)[1]["face"][0] == "ignore"


def test_the_vectors_of_a_table_of_items_are_proposed(write, tmp_path):
  events = write("events.parquet", log(film=[f"f{i % 37}" for i in range(N)]))
  films = write("films.parquet", {"film": [f"f{i}" for i in range(37)], "plot": embeddings()[:37]})
  (tmp_path / "proposed.py").write_text(inspect([str(events), str(films)]).config)
  cfg = config.load(str(tmp_path / "proposed.py"))
  assert cfg.data.fields["plot"].kind == "vector" and cfg.data.sources["events"].items is not None
