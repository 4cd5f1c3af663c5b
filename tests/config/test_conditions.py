"""The language of conditions: what it reads, what it refuses, and how its messages help."""

import pytest

from supermoe_jax import config
from supermoe_jax.config.tasks.condition import (
  AllOf,
  AnyOf,
  Comparison,
  Negation,
  comparisons,
  parse_condition,
  parse_sample_space,
)
from supermoe_jax.errors import ConfigError


def test_comparisons_join_as_in_python() -> None:
  found = parse_condition("kind == 'buy' and (price >= 50 or not colour in ('red', 'blue'))", "where")
  assert found == AllOf(
    (
      Comparison("kind", "==", ("buy",)),
      AnyOf((Comparison("price", ">=", (50.0,)), Negation(Comparison("colour", "in", ("red", "blue"))))),
    )
  )
  assert [c.field for c in comparisons(found)] == ["kind", "price", "colour"]


@pytest.mark.parametrize(
  ("text", "found"),
  [
    ("5 < price", Comparison("price", ">", (5.0,))),
    ("price > -2.5", Comparison("price", ">", (-2.5,))),
    ("shop not in (3, 4)", Comparison("shop", "not in", (3.0, 4.0))),
    ("1 <= price < 3", AllOf((Comparison("price", ">=", (1.0,)), Comparison("price", "<", (3.0,))))),
    (" price != 0 ", Comparison("price", "!=", (0.0,))),
    ("sum(price) >= 50", Comparison("price", ">=", (50.0,), "sum")),
    ("2 < count()", Comparison("", ">", (2.0,), "count")),
    (
      "1 <= mean(price) < 3",
      AllOf((Comparison("price", ">=", (1.0,), "mean"), Comparison("price", "<", (3.0,), "mean"))),
    ),
  ],
)
def test_a_comparison_has_its_field_on_the_left(text: str, found: object) -> None:
  assert parse_condition(text, "where") == found


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("kind = 'buy'", "write == to compare"),
    ("kind == buy", "put a text in quotes: 'buy'"),
    ("price", "'price' is no comparison"),
    ("price + 1 > 3", "'price \\+ 1' is no field"),
    ("len(kind) > 3", "is no field"),
    ("median(price) > 3", "functions of a moment's events are sum, mean, max, min, count"),
    ("sum(price, shop) > 3", r"must name one field, as in sum\(amount\)"),
    ("sum(price * 2) > 3", r"must name one field, as in sum\(amount\)"),
    ("count(price) > 3", r"takes no field; write count\(\)"),
    ("sum(price) == 'high'", r"is a text; compare sum\(price\) with a number"),
    ("sum(price) in (1, 2)", "is no list of constants such as .* after a field"),
    ("sum(price) > sum(cost)", "is no text and no number"),
    ("price is None", "uses another operator"),
    ("kind in 'buy'", "is no list of constants"),
    ("kind in ('a', 1)", "mixes texts and numbers"),
    ("kind == True", "'True' is no text and no number"),
    ("", "cannot be read"),
    ("kind == 'buy' and", "cannot be read"),
  ],
)
def test_what_is_no_condition_is_refused_with_its_key_and_part(text: str, said: str) -> None:
  with pytest.raises(ConfigError, match=said) as found:
    parse_condition(text, "config.tasks.t.where")
  assert f"config.tasks.t.where={text!r}" in str(found.value)


def _raw(where: str, **fields: object) -> dict:
  return {
    "data": {
      "path": "d",
      "sources": {"log": {"files": ["log.parquet"], "type": "action"}},
      "fields": {"price": {"kind": "numeric"}, "shop": {}, "tags": {"many": 3}, "hashed": {"kind": "hash"}, **fields},
      "split": {"train_end": "2024-01-01", "validation": ["2024-01-02"], "test": ["2024-02-01"]},
    },
    "tasks": {"t": {"kind": "future_event", "where": where}},
  }


@pytest.mark.parametrize(
  ("where", "said"),
  [
    ("prize > 3", "'prize' is not a field; did you mean 'price'"),
    ("price == 'high'", "'price' is a numeric field; compare it with a number"),
    ("shop > 3", "a vocabulary field, whose values have no order"),
    ("tags == 'a'", "'tags' holds lists"),
    ("hashed == 'a'", "share codes"),
    ("sum(shop) > 3", r"sum\(shop\) needs a numeric field, and 'shop' is none"),
    ("mean(prize) > 3", "'prize' is none; did you mean 'price'"),
    ("sum(rank) > 3", "a quantile keeps no amounts to add; set config.data.fields.rank.encoding='log1p'"),
    ("max(age) > 3", "'age' is of the table of users"),
  ],
)
def test_a_condition_that_compares_what_cannot_be_compared_is_refused(where: str, said: str) -> None:
  rank, age = {"kind": "numeric", "encoding": "quantile"}, {"kind": "numeric", "table": "users"}
  raw = _raw(where, rank=rank, age=age)
  raw["data"]["users"] = {"files": ["users.parquet"]}
  with pytest.raises(ConfigError, match=said):
    config.resolve(raw)


def test_a_quantile_has_a_largest_number_of_a_moment() -> None:
  config.resolve(_raw("max(rank) > 3 and count() < 9", rank={"kind": "numeric", "encoding": "quantile"}))


def test_a_split_that_tears_moments_apart_refuses_conditions_on_them() -> None:
  raw = _raw("")
  raw["data"]["split"] = {"mode": "leave_one_out"}
  raw["tasks"]["t"] = {"kind": "next_event", "field": "shop", "where": "sum(price) > 3"}
  with pytest.raises(ConfigError, match=r"sum\(price\) is about all events of a moment.*set mode='temporal' or 'user'"):
    config.resolve(raw)


def test_a_sample_space_is_about_a_label_and_no_moment() -> None:
  with pytest.raises(ConfigError, match="a function of a moment's events belongs into the task's 'where'"):
    parse_sample_space("sum(price) == 1")


def test_a_source_of_types_gets_a_field_of_its_column() -> None:
  found = config.resolve(_raw("action == 'buy'"))
  assert found.data.fields["action"] == config.Field(sources=("log",))
  assert found.data.typed("buy") == ("log", "action", "buy")
  assert config.resolve(config.to_dict(found)) == found


def test_a_field_that_reads_the_column_of_types_is_used() -> None:
  found = config.resolve(_raw("", what={"column": "action"}))
  assert "action" not in found.data.fields
  assert found.data.typed("log.buy") == ("log", "what", "buy")


def test_a_column_of_types_under_the_name_of_another_field_is_refused() -> None:
  with pytest.raises(ConfigError, match=r"config\.data\.fields\.action is another field"):
    config.resolve(_raw("", action={"kind": "numeric"}))


def test_a_source_that_is_none_and_may_be_no_type_is_refused() -> None:
  raw = _raw("")
  raw["data"]["sources"]["log"]["type"] = ""
  raw["tasks"]["t"]["source"] = "lot"
  with pytest.raises(ConfigError, match="source='lot' is not a source; did you mean 'log'"):
    config.resolve(raw)
