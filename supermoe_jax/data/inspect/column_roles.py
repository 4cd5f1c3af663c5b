"""Guesses the role of a column of an event log (user, time, field) from its type, values and name, and gives a reason.

A person reads these proposals. The rules are therefore plain enough to be stated in a few words.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from supermoe_jax.data.reading import value_sql
from supermoe_jax.data.reading.time_formats import fitting_formats

VOCABULARY_LIMIT = 100_000  # values beyond which a field is hashed
FEW_VALUES = 20  # distinct numbers up to which a column is categorical, such as ratings
MOSTLY = 0.95  # the share of values that makes a column numeric or a time; the other values are then bad
LONG_TEXT = 60  # characters on average
LONG, DIFFERENT = "long text", "a different value in each row"  # reasons to leave out a column
SKEW = 10  # log1p is proposed above this ratio of the largest value to the mean

USER_WORDS = (
  *("user", "uid", "customer", "household", "client", "visitor", "member", "account", "person", "profile"),
  *("subscriber", "player", "patient", "device", "session"),
)
ITEM_WORDS = (
  *("item", "product", "sku", "article", "movie", "track", "song", "video", "book", "content", "listing", "page"),
  *("category", "url", "merchant", "event", "action", "behavior", "behaviour", "type"),
)
ID_WORDS = (
  *("id", "code", "class", "group", "store", "shop", "upc", "brand", "department", "campaign", "zip", "key", "status"),
)
NUMBERED = ("no", "nr", "num", "number", "ref", "reference", "uuid", "guid")  # endings of names of ids
# Names of records, which have numbers; `orders` and `order_value` are quantities.
RECORD = re.compile(
  "(invoice|order|transaction|receipt|ticket|basket|cart|booking|purchase|visit)(id|no|nr|num|number|key|ref)?"
)
LARGE_ID = 10_000  # ids that run on, such as of invoices, have at least this many before them
LABEL_WORDS = (
  *("label", "target", "outcome", "click", "convert", "conversion", "purchased", "bought", "churn", "like", "fraud"),
  *("default", "returned", "refund", "rating", "cancel", "subscribed"),
)
# Words of amounts, the likeliest first; columns of such names are numbers however few they are.
AMOUNT_WORDS = (
  *("amount", "revenue", "sales", "spend", "spent", "total", "price", "cost", "paid", "payment", "turnover", "gmv"),
  *("value", "betrag", "umsatz", "preis", "montant", "prix", "importe", "precio"),
)
# Words of the type of an event.
TYPE_WORDS = ("behavior", "behaviour", "action", "event", "type", "kind", "activity", "operation")
TIME_WORDS = ("time", "timestamp", "ts", "date", "datetime", "created", "occurred", "epoch", "at")
CALENDAR_WORDS = ("week", "month", "year", "day", "hour", "weekday", "quarter")

FORMAT_SAMPLE = 100  # values that a time format must fit


@dataclasses.dataclass(frozen=True)
class ColumnStatistics:
  """Statistics of a column over all rows of its table.

  Attributes:
    name: the column's name.
    type: the column's DuckDB type.
    rows: the number of rows of the table.
    present: the number of rows with a value.
    distinct: the number of distinct values.
    numbers: the number of values that are finite numbers.
    low: the smallest number, None if there is no number.
    high: the largest number, None if there is no number.
    size: the mean of the numbers' absolute values.
    whole: whether all numbers are whole.
    iso_times: the number of values of a text column that are ISO 8601 times.
    codes: the number of values of a text column that are a code: digits with letters before or behind them, as in
      C489435, or with zeros before them.
    length: the mean number of characters.
    sample: the distinct values among the first rows, in order.
  """

  name: str
  type: str
  rows: int
  present: int
  distinct: int
  numbers: int = 0
  low: float | None = None
  high: float | None = None
  size: float | None = None
  whole: bool = False
  iso_times: int = 0
  codes: int = 0
  length: float = 0.0
  sample: tuple[str, ...] = ()

  @property
  def numeric(self) -> bool:
    """Returns whether most values are numbers."""
    return self.present > 0 and self.numbers >= MOSTLY * self.present

  @property
  def holds_lists(self) -> bool:
    """Returns whether the values are lists of texts or whole numbers; for text, whether the sample is JSON arrays."""
    if self.type == "VARCHAR":
      return bool(self.sample) and all(v.startswith("[") and v.endswith("]") for v in self.sample)
    return re.fullmatch(r"(VARCHAR|U?(TINYINT|SMALLINT|INTEGER|BIGINT|HUGEINT))\[\d*\]", self.type) is not None

  @property
  def name_words(self) -> list[str]:
    """Returns the words of the name: `productId` and `product_id` are `product`, `id`."""
    return [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", self.name)]

  def named(self, words: Sequence[str]) -> int | None:
    """Returns the index of the first of `words` that equals or, with over three letters, begins a word of the name."""
    for place, word in enumerate(words):
      if any(w == word or (len(word) > 3 and w.startswith(word)) for w in self.name_words):
        return place
    return None


@dataclasses.dataclass(frozen=True)
class ColumnRole:
  """The proposed role of a column.

  Attributes:
    kind: user, time, vocabulary, hash, numeric, vector or ignore.
    reason: the reason for the role, in a few words.
    settings: the settings of the column's entry in the config, apart from its name.
    note: a remark about these settings.
  """

  kind: str
  reason: str
  settings: Mapping[str, str | int] = dataclasses.field(default_factory=dict)
  note: str = ""


def time_sql(column: str, type: str, role: ColumnRole) -> str:
  """Returns the SQL that reads a time column by its role, as microseconds since 1970 UTC."""
  if value_sql.is_instant(type):
    return value_sql.instant_sql(column, type)
  if format := role.settings.get("time_format"):
    return value_sql.formatted_sql(column, type, str(format))
  if role.reason.startswith("epoch") or value_sql.is_number(type):
    return value_sql.epoch_sql(column, type, str(role.settings.get("time_unit", "s")))
  return value_sql.iso_sql(column)


def sequence_time(columns: Sequence[ColumnStatistics]) -> tuple[int, ColumnRole]:
  """Returns the index and the role of the column `position`, which serves as the time in a file of sequences."""
  names = [column.name for column in columns]
  return names.index("position"), ColumnRole("time", "the place in the sequence", {"time_unit": "s"})


def may_be_lists(role: ColumnRole) -> bool:
  """Returns whether a column of this role may rather hold lists in text."""
  return role.kind in ("vocabulary", "hash") or role.reason in (LONG, DIFFERENT)


def choose_time(columns: Sequence[ColumnStatistics]) -> tuple[int, ColumnRole] | None:
  """Returns the index and the role of the likeliest time column; the first one if several are equally likely."""
  best: tuple[float, int, ColumnRole] | None = None
  for place, column in enumerate(columns):
    likely = _time_role(column)
    if likely and (best is None or likely[0] > best[0]):
      best = (likely[0], place, likely[1])
  return best[1:] if best else None


def _time_role(column: ColumnStatistics) -> tuple[float, ColumnRole] | None:
  """Returns a score of how likely a column is the time, and its role as the time; None if it cannot be the time."""
  named = 0.5 * (column.named(TIME_WORDS) is not None)
  if not column.present:
    return None
  if value_sql.is_instant(column.type):
    return 3 + named, ColumnRole("time", "timestamps")
  if column.type == "VARCHAR" and column.iso_times >= MOSTLY * column.present:
    return 3 + named, ColumnRole("time", "ISO 8601")
  if (column.numeric and column.whole) or (column.type == "VARCHAR" and not column.numeric):
    formats = fitting_formats(column.sample[:FORMAT_SAMPLE])
    if formats and (named or not column.numeric):
      other = f"; or {formats[1]}?" if len(formats) > 1 else ""
      return 2 + named, ColumnRole("time", f"dates as {formats[0]}{other}", {"time_format": formats[0]})
  if not column.numeric or column.low is None or column.high is None:
    return None
  if units := value_sql.plausible_units(column.low, column.high):
    settings: dict[str, str | int] = {} if units[0] == "s" else {"time_unit": units[0]}
    likely = 2.0 if named else 1.0 if column.named(ID_WORDS) is None else 0.0
    return (likely + named, ColumnRole("time", f"epoch in {units[0]}", settings)) if likely else None
  if named:
    return 0.5, ColumnRole("time", "epoch? its values lie before 1980 or after 2100", {"time_unit": "s"})
  return None


def user_candidates(columns: Sequence[ColumnStatistics], time: int | None) -> list[int]:
  """Returns the indices of the columns that may be the user, likeliest first."""
  exact: list[tuple[int, int]] = []
  described: list[tuple[int, int]] = []
  for place, column in enumerate(columns):
    named = column.named(USER_WORDS)
    if place == time or named is None or not _may_be_id(column):
      continue
    # `user_id` is the user; `user_age` is an attribute of the user.
    rest = [w for w in column.name_words if w not in ("id", "key", "no", "number", "hash", "hashed")]
    (exact if len(rest) == 1 or "id" in column.name_words else described).append((named, place))
  ranked = sorted(exact or described)
  if not ranked and time is not None:  # judged by values: the first column whose ids repeat
    ranked = [(0, p) for p, c in enumerate(columns) if p != time and _may_be_id(c) and c.distinct <= c.present / 2][:1]
  return [place for _, place in ranked]


def _may_be_id(column: ColumnStatistics) -> bool:
  fraction = column.numbers > 0 and not column.whole
  return (
    column.distinct >= 2 and not fraction and not _nested(column) and column.type != "BOOLEAN" and column.length < 40
  )


def _nested(column: ColumnStatistics) -> bool:
  objects = column.type == "VARCHAR" and bool(column.sample) and all(_is_object(v) for v in column.sample)
  return objects or column.type.endswith("]") or column.type.startswith(("STRUCT", "MAP", "UNION", "BLOB"))


def _is_object(value: str) -> bool:
  return value.startswith("{") and value.endswith("}")


def field_role(column: ColumnStatistics, *, timed: bool = True, one_user_each: bool = False) -> ColumnRole:
  """Returns the role of a column that is neither user nor time.

  Args:
    column: the column.
    timed: whether the table has a time, which makes calendar columns superfluous.
    one_user_each: whether each value of the column belongs to one user.
  """
  if column.present == 0:
    return ColumnRole("ignore", "no value")
  if column.distinct == 1:
    return ColumnRole("ignore", "one value only")
  if _nested(column):
    return ColumnRole("ignore", "nested values")
  likely = _time_role(column)
  if likely and likely[0] >= 2:
    return ColumnRole("ignore", "another time")
  if timed and column.named(CALENDAR_WORDS) is not None and column.numeric:
    return ColumnRole("ignore", "calendar: the time holds it already")
  if _is_quantity(column):
    assert column.high is not None and column.low is not None and column.size is not None
    skewed = max(abs(column.high), abs(column.low)) > SKEW * column.size
    bad = f", except {column.present - column.numbers:,} values" if column.numbers < column.present else ""
    return ColumnRole("numeric", ("skewed" if skewed else "a quantity") + bad, {"encoding": "log1p"} if skewed else {})
  if _differs_in_each_row(column):
    return ColumnRole("ignore", DIFFERENT)
  if one_user_each:
    return ColumnRole("ignore", "each value belongs to one user: it identifies users")
  if column.length > LONG_TEXT:
    return ColumnRole("ignore", LONG)
  if column.distinct > VOCABULARY_LIMIT:
    return ColumnRole(
      "hash", f"more than {VOCABULARY_LIMIT:,} values", {"size": 1 << (column.distinct - 1).bit_length()}
    )
  if column.numeric and column.distinct > FEW_VALUES:
    return ColumnRole("vocabulary", "numbers that are ids")
  return ColumnRole("vocabulary", "few numbers" if column.numeric and not _is_id(column) else "categories")


def _differs_in_each_row(column: ColumnStatistics) -> bool:
  return column.rows > FEW_VALUES and column.distinct >= MOSTLY * column.present


def _is_id(column: ColumnStatistics) -> bool:
  """Returns whether numbers are ids by their name."""
  return (
    column.named((*ID_WORDS, *ITEM_WORDS)) is not None
    or column.name_words[-1:] in [[word] for word in NUMBERED]
    or RECORD.fullmatch("".join(column.name_words)) is not None
  )


def _looks_like_ids(column: ColumnStatistics) -> bool:
  """Returns whether whole numbers are ids by their values.

  Some values of the column are codes. Or the numbers count the rows. Or they are large and of the same size, as the
  numbers of invoices are; a quantity has small values too.
  """
  if column.codes or column.low is None or column.high is None:
    return column.codes > 0
  extent = column.high - column.low
  counting = _differs_in_each_row(column) and extent < column.distinct / MOSTLY
  return column.distinct > FEW_VALUES and (counting or (column.low >= LARGE_ID and column.low >= extent))


def _is_quantity(column: ColumnStatistics) -> bool:
  if not column.numeric or column.type == "BOOLEAN":
    return False
  if column.whole and (_is_id(column) or _looks_like_ids(column)):
    return False
  return not column.whole or column.distinct > FEW_VALUES or column.named(AMOUNT_WORDS) is not None


def next_event_rank(column: ColumnStatistics) -> tuple[int, int]:
  """Returns a sort key of vocabulary fields: the smaller, the likelier is the field the one to predict."""
  named = column.named(ITEM_WORDS)
  return (len(ITEM_WORDS) if named is None else named, -column.distinct)
