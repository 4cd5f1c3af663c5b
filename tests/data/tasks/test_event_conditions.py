"""Conditions on events, amounts of windows and times to events, against plain Python over raw values."""

import math
import operator
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY as DAY
from supermoe_jax.data.encoding.histories import UserBlock
from supermoe_jax.data.encoding.numeric import Numeric
from supermoe_jax.data.encoding.splits import TRAIN
from supermoe_jax.data.encoding.vocabulary import Encoders, Vocabulary
from supermoe_jax.data.preparation.snapshots import user_snapshots
from supermoe_jax.data.tasks import bind
from supermoe_jax.data.tasks.calendar import make_calendar
from supermoe_jax.data.tasks.event_condition import event_condition
from supermoe_jax.data.tasks.labels import LabelInputs
from supermoe_jax.errors import DataError

VALUES = ["view", "buy", "7"]
NUMBERS = [None, -2.0, 0.0, 1.0, 3.5, 50.0]
SPLIT = config.Split(train_end="1970-02-10", validation=("1970-02-10",), test=("1970-03-01",))
CALENDAR = make_calendar(SPLIT, 0, 80 * DAY)


def _data(encoding: str = "standardise") -> config.Data:
  fields = {"what": config.Field(), "price": config.Field(kind="numeric", encoding=encoding)}
  sources = {"web": config.Source(files=("w",), type="what"), "shop": config.Source(files=("s",))}
  return config.Data(sources=sources, fields=fields, split=SPLIT)


ENCODERS = Encoders({"what": Vocabulary(VALUES, np.array([3, 2, 1]))}, {"price": Numeric(1.5, 4.0)}, {})


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[tuple], UserBlock, str]:
  """Raw events (user, time, source, what, price) of a few users, ordered, and the block that holds them."""
  raw = draw(
    st.lists(
      st.tuples(
        st.integers(0, 2),
        st.integers(0, 79),
        st.integers(0, 1),
        st.sampled_from([None, "odd", *VALUES]),
        st.sampled_from(NUMBERS),
      ),
      min_size=1,
      max_size=30,
    )
  )
  encoding = draw(st.sampled_from(["standardise", "log1p"]))
  raw = sorted(raw, key=lambda e: e[:2])
  users = sorted({e[0] for e in raw})
  vocabulary, numeric = ENCODERS.categorical["what"], ENCODERS.numeric["price"]
  offsets = np.append(0, np.cumsum([sum(e[0] == u for e in raw) for u in users]))
  block = UserBlock(
    [f"u{u}" for u in users],
    offsets,
    np.array([e[1] * DAY for e in raw]),
    np.array([e[2] for e in raw], np.int32),
    np.array([[vocabulary.code(e[3])] for e in raw], np.int32),
    np.array([[math.nan if e[4] is None else numeric.encode(e[4], encoding)] for e in raw], np.float32),
    np.array([sum(e[0] == u and e[1] < 40 for e in raw) for u in users]),
  )
  return raw, block, encoding


OPERATORS = {
  "==": operator.eq,
  "!=": operator.ne,
  "<": operator.lt,
  "<=": operator.le,
  ">": operator.gt,
  ">=": operator.ge,
}


@st.composite
def conditions(draw: st.DrawFn) -> tuple[str, object]:
  """A condition as text, and as a function of a raw event."""
  kind = draw(st.sampled_from(["what", "in", "price", "not", "and", "or"]))
  if kind == "what":
    op, value = draw(st.sampled_from(["==", "!="])), draw(st.sampled_from(VALUES))
    text = value if value == "7" else repr(value)
    return f"what {op} {text}", lambda e: e[3] is not None and OPERATORS[op](e[3], value)
  if kind == "in":
    values, negated = draw(st.lists(st.sampled_from(VALUES), min_size=1)), draw(st.booleans())
    text = f"what {'not in' if negated else 'in'} {values}"
    return text, lambda e: e[3] is not None and (e[3] in values) != negated
  if kind == "price":
    op, number = draw(st.sampled_from(sorted(OPERATORS))), draw(st.sampled_from([-2.0, 0.5, 1.0, 50.0]))
    return f"price {op} {number}", lambda e: e[4] is not None and OPERATORS[op](e[4], number)
  one, holds = draw(conditions())
  if kind == "not":
    return f"not ({one})", lambda e: not holds(e)
  other, also = draw(conditions())
  join = all if kind == "and" else any
  return f"({one}) {kind} ({other})", lambda e: join((holds(e), also(e)))


@settings(max_examples=200, deadline=None)
@given(logs(), conditions())
def test_a_condition_equals_plain_python_over_raw_values(log: tuple, condition: tuple) -> None:
  raw, block, encoding = log
  text, holds = condition
  bound = pickle.loads(pickle.dumps(event_condition("t", text, "", _data(encoding), ENCODERS)))
  assert bound(block).tolist() == [holds(e) for e in raw]


@pytest.mark.parametrize(("name", "wanted"), [("shop", (1, None)), ("buy", (0, "buy")), ("web.view", (0, "view"))])
@settings(max_examples=30, deadline=None)
@given(logs())
def test_an_event_type_is_a_source_or_a_value_of_its_column_of_types(name: str, wanted: tuple, log: tuple) -> None:
  raw, block, encoding = log
  bound = event_condition("t", "", name, _data(encoding), ENCODERS)
  assert bound is not None
  assert bound(block).tolist() == [e[2] == wanted[0] and (wanted[1] is None or e[3] == wanted[1]) for e in raw]


@pytest.mark.parametrize(("where", "source"), [("what == 'bye'", ""), ("", "bye"), ("what in ('buy', 'bye')", "")])
def test_a_value_that_never_occurs_is_an_error_that_names_the_nearest(where: str, source: str) -> None:
  with pytest.raises(DataError, match=r"t\.\w+: 'bye' never occurs .* did you mean 'buy'"):
    event_condition("t", where, source, _data(), ENCODERS)


@settings(max_examples=200, deadline=None)
@given(logs(), conditions(), st.sampled_from(["sum", "mean", "max", "count", "moments"]), st.sampled_from([3.0, 11.0]))
def test_amounts_equal_plain_python_over_raw_values(log: tuple, condition: tuple, of: str, days: float) -> None:
  raw, block, encoding = log
  text, holds = condition
  data = _data(encoding)
  field = "" if of in ("count", "moments") else "price"
  task = config.FutureAmount(field=field, of=of, where=text, horizon_days=days)
  (kind,) = bind({"t": task}, data, ENCODERS).values()
  snapshots, _ = user_snapshots(SPLIT, block, CALENDAR, np.full(len(block.users), TRAIN))
  found = kind.label(LabelInputs(block, snapshots, CALENDAR, np.zeros(len(block.users)), {}, {})).labels
  before = kind.before(block, snapshots.user, snapshots.time, snapshots.n_events)
  users = sorted({e[0] for e in raw})
  for i, (user, time, _, split) in enumerate(zip(*snapshots)):
    end = time + days * DAY
    for first, last, amount, known in (
      (time, end, found.value[i], found.known[i]),
      (time - days * DAY, time, before[i], None),
    ):
      inside = [e for e in raw if e[0] == users[user] and first <= e[1] * DAY < last and holds(e)]
      numbers = [e[4] for e in inside if e[4] is not None]
      if not field:
        numbers = [1.0] * len(inside if of == "count" else {e[1] for e in inside})
      wanted = {"mean": lambda x: sum(x) / len(x), "max": max}.get(of, sum)(numbers) if numbers else 0.0
      observed = end <= CALENDAR.observed_until[split] and (bool(numbers) or of not in ("mean", "max"))
      assert known is None or bool(known) == observed
      assert amount == pytest.approx(wanted if known is None or observed else 0.0, rel=1e-5, abs=1e-5)


@settings(max_examples=300, deadline=None)
@given(logs(), conditions(), st.sampled_from([(25.0,), (1.0, 4.5, 9.0, 25.0), (9.0, 12.0, 40.0)]))
def test_times_to_an_event_equal_plain_python_over_raw_values(log: tuple, condition: tuple, edges: tuple) -> None:
  raw, block, encoding = log
  text, holds = condition
  task = config.TimeToEvent(where=text, horizon_days=edges[-1], edges_days=edges)
  (kind,) = bind({"t": task}, _data(encoding), ENCODERS).values()
  snapshots, _ = user_snapshots(SPLIT, block, CALENDAR, np.full(len(block.users), TRAIN))
  found = kind.label(LabelInputs(block, snapshots, CALENDAR, np.zeros(len(block.users)), {}, {})).labels
  gaps = kind.by_own_gaps(block, snapshots.user, snapshots.time, snapshots.n_events)
  users = sorted({e[0] for e in raw})
  for i, (user, time, _, split) in enumerate(zip(*snapshots)):
    day = time / DAY
    followed = [edge for edge in edges if time + edge * DAY <= CALENDAR.observed_until[split]]
    asked = [e[1] for e in raw if e[0] == users[user] and holds(e)]
    waits = [at - day for at in asked if at >= day]
    assert bool(found.known[i]) == bool(followed)
    if not followed:
      wanted = (0.0, 0.0)
    else:
      wanted = (waits[0], 1.0) if waits and waits[0] < followed[-1] else (followed[-1], 0.0)
    assert tuple(found.value[i]) == pytest.approx(wanted)
    before = sorted({at for at in asked if at < day})
    mean = (before[-1] - before[0]) / (len(before) - 1) if len(before) > 1 else 0.0
    assert gaps[i] == pytest.approx(min(edges[-1], max(mean, day - before[-1])) if before else edges[-1])


@settings(max_examples=60, deadline=None)
@given(logs(), st.sampled_from(["sum", "mean", "max"]))
def test_an_amount_does_not_depend_on_the_users_of_the_block(log: tuple, of: str) -> None:
  _, block, encoding = log
  task = config.FutureAmount(field="price", of=of, horizon_days=9.0)
  (kind,) = bind({"t": task}, _data(encoding), ENCODERS).values()

  def amounts(part: UserBlock) -> list[float]:
    snapshots, _ = user_snapshots(SPLIT, part, CALENDAR, np.full(len(part.users), TRAIN))
    inputs = LabelInputs(part, snapshots, CALENDAR, np.zeros(len(part.users)), {}, {})
    return kind.label(inputs).labels.value.tolist()

  alone = []
  for u in range(len(block.users)):
    events = slice(block.offsets[u], block.offsets[u + 1])
    parts = (x[events] for x in (block.time, block.source, block.codes, block.numeric))
    n = block.offsets[u + 1] - block.offsets[u]
    alone += amounts(UserBlock([block.users[u]], np.array([0, n]), *parts, block.n_train[u : u + 1]))
  assert amounts(block) == alone
