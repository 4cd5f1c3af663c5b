"""Questions that no task asked, and the aggregates beside them, of households whose baskets are written by hand."""

import datetime
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.fixtures import scripts

DAY = datetime.datetime(2017, 10, 1)


def write_tables(folder: pathlib.Path) -> None:
  """Ann buys before and after the first of October; Bob came once, on a Monday in January."""
  lines = [  # household, basket, days after the first of October (a Sunday), hour, store, product, paid, saved
    (1, 10, -40, 9, 1, 1, 30.0, 0.0),
    (1, 11, -6, 18, 1, 2, 20.0, 0.0),
    (1, 12, 5, 19, 2, 1, 6.0, 4.0),  # a Friday
    (1, 13, 6, 20, 2, 3, 4.0, 0.0),
    (2, 20, -265, 12, 1, 1, 5.0, 0.0),
  ]
  times = [DAY + datetime.timedelta(days=line[2], hours=line[3]) for line in lines]
  names = ("household_id", "basket_id", "store_id", "product_id", "sales_value", "retail_disc")
  columns = {name: [line[i] for line in lines] for name, i in zip(names, (0, 1, 4, 5, 6, 7))}
  pq.write_table(pa.table(columns | {"transaction_timestamp": times}), folder / "transactions.parquet")
  products = {
    "product_id": [1, 2, 3],
    "product_category": ["tea", "fuel", "jam"],
    "department": ["GROCERY", "FUEL", "GROCERY"],
    "brand": ["National", "National", "Private"],
  }
  pq.write_table(pa.table(products), folder / "products.parquet")


@pytest.mark.nightly
def test_questions_and_aggregates_of_a_household(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.syspath_prepend(str(scripts.BENCHMARKS))
  script = scripts.load(scripts.BENCHMARKS / "untrained_questions.py")
  monkeypatch.setattr(script, "tables_folder", lambda: tmp_path)
  write_tables(tmp_path)
  script.write_tables(tmp_path)
  asked = {(r["household_id"], r["day"]): r for r in pq.read_table(tmp_path / "questions.parquet").to_pylist()}
  assert len(asked) == 4
  ann, bob = asked[1, DAY], asked[2, DAY]
  yes = {"spends_half", "comes_more", "new_store", "evening", "own_brand", "discount"}
  assert {name for name, answer in ann.items() if answer is True} == yes
  assert ann["weekend"] is False and ann["many_stores"] is False  # one of two baskets on Saturday; one store
  silent = {"weekend", "evening", "own_brand", "discount", "many_stores"}
  assert {name for name, answer in bob.items() if answer is None} == silent
  known = {(r["user_id"], r["as_of"]): r for r in pq.read_table(tmp_path / "aggregates.parquet").to_pylist()}
  of_ann = known[1, DAY]
  assert len(of_ann) == 205 and known.keys() == asked.keys()
  assert (of_ann["spend_28"], of_ann["spend_84"], of_ann["baskets_84"]) == (20, 50, 2)
  assert of_ann["recency"] == pytest.approx(5.25) and of_ann["tenure"] == pytest.approx(39.625)
  assert of_ann["evening_84"] == 0.5 and known[1, DAY.replace(month=11)]["spend_28"] == pytest.approx(10)
