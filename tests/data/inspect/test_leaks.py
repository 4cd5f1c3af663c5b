"""Columns that nearly tell a label are named by `inspect`, honest ones are not."""

from __future__ import annotations

import numpy as np
import pytest

from supermoe_jax.data.inspect import leaks
from supermoe_jax.data.inspect.inspect import inspect

N, USERS = 4000, 100
RNG = np.random.default_rng(0)
OWNER = np.arange(N) % USERS
CLICKED = RNG.random(N) < 0.3
PREMIUM = RNG.random(USERS) < 0.4


def events(**columns):
  """Honest events: the item and the price say something of the click, but far from all."""
  item = np.where(CLICKED, RNG.integers(0, 30, N), RNG.integers(10, 40, N))
  return {
    "user_id": OWNER.tolist(),
    "timestamp": (1_590_969_600 + 600 * np.arange(N)).tolist(),
    "item_id": [f"i{i}" for i in item],
    "price": (RNG.gamma(2.0, 5.0, N) + 4 * CLICKED).round(2).tolist(),
    "clicked": CLICKED.astype(int).tolist(),
    **{name: [None if v is None else v for v in values] for name, values in columns.items()},
  }


def users():
  return {"user_id": list(range(USERS)), "premium": ["yes" if p else "no" for p in PREMIUM]}


@pytest.fixture
def suspects(write):
  """Inspects events, and users if given; returns the suspicious columns and what each tells."""

  def run(columns, people=None):
    files = [write("log.parquet", columns), *([write("people.csv", people)] if people else [])]
    return {(s.column, s.label) for s in inspect([str(f) for f in files]).suspects}

  return run


def test_honest_columns_are_not_suspected(suspects):
  assert suspects(events(), users()) == set()


LEAKS = {
  "a copy under another name": np.where(CLICKED, "opened", "shown").tolist(),
  "filled in only when the label says yes": [str(RNG.integers(4)) if c else None for c in CLICKED],
  "finer than the label": [f"{'ab' if c else 'xyz'}{RNG.integers(9)}" for c in CLICKED],
  "a quantity that is zero otherwise": np.where(CLICKED, RNG.gamma(2.0, 9.0, N) + 0.01, 0.0).tolist(),
  "right but for one in fifty": np.where(CLICKED ^ (RNG.random(N) < 0.02), "opened", "shown").tolist(),
}


@pytest.mark.parametrize("kind", LEAKS)
def test_a_column_that_tells_a_label_of_the_events_is_named(kind, suspects):
  assert suspects(events(hint=LEAKS[kind])) == {("hint", "log.clicked")}


@pytest.mark.parametrize("wrong", [0.2, 0.5])
def test_a_column_that_is_often_wrong_is_not_named(wrong, suspects):
  hint = np.where(CLICKED ^ (RNG.random(N) < wrong), "opened", "shown").tolist()
  assert suspects(events(hint=hint)) == set()


def test_a_column_that_tells_a_label_of_the_users_is_named(suspects):
  hint = [("gold", "silver")[i % 2] if PREMIUM[u] else "plain" for i, u in enumerate(OWNER)]
  assert suspects(events(hint=hint), users()) == {("hint", "people.premium")}
  assert suspects(events(hint=hint)) == set()  # without the table there is no such label


def test_a_value_of_few_users_says_who_they_are_and_is_not_suspected(suspects):
  # Each street has two users, so that it tells what is known of users by chance.
  by_pair = np.repeat(RNG.random(USERS // 2) < 0.5, 2)
  people = {"user_id": list(range(USERS)), "premium": ["yes" if p else "no" for p in by_pair]}
  assert suspects(events(street=[f"s{u // 2}" for u in OWNER]), people) == set()


def test_a_label_that_hardly_varies_suspects_nothing(suspects):
  rare = np.zeros(N, int)
  rare[: leaks.LEAST_ROWS - 1] = 1
  assert suspects(events(clicked=rare.tolist(), hint=[f"h{v}" for v in rare])) == set()


def test_a_sample_of_the_users_is_enough(monkeypatch, suspects):
  monkeypatch.setattr(leaks, "SAMPLE_ROWS", N // 4)
  assert suspects(events(hint=LEAKS["a copy under another name"])) == {("hint", "log.clicked")}


def test_a_suspect_is_rendered_with_the_remedy(write):
  text = inspect([str(write("log.parquet", events(hint=LEAKS["a copy under another name"])))]).render()
  assert "Suspicious columns:\n  log.hint predicts log.clicked in 100.0% of the rows, the commonest value in 7" in text
  assert "input=False" in text
