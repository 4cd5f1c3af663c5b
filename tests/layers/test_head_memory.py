"""What a head remembers at each site: own values, and followers without the own pairs, one number at a time."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import config, device_mesh
from supermoe_jax.layers.memory.head_memory import FADE, FOLLOWERS, FollowRows, FollowRule, FollowTable, HeadMemory
from supermoe_jax.layers.memory.remembered import Remembered
from tests.layers.test_remembered import dense

SIZE = 302  # as in `dense`
L, S = 9, 3

# Row 0: two users, one event without a value, two events at one time. Row 1: one user, values that repeat.
CODES = np.array([[5, 7, 0, 5, 9, 1, 4, 5, 0], [6, 6, 8, 6, 8, 3, 6, 0, 0]], np.int32)
SEGMENT = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 0, 0]], np.int32)
GAP = np.array([[0, 2, 3, 0, 1, 0, 1, 1, 0], [0, 1, 0, 0, 4, 1, 0, 0, 0]], np.float32)
QUERY_SEGMENT = np.array([[1, 2, 0], [1, 1, 1]], np.int32)
QUERY_EVENTS = np.array([[4, 3, 0], [0, 5, 7]], np.int32)
ROW = types.SimpleNamespace(
  codes=np.stack([np.full_like(CODES, 2), CODES], axis=2),
  segment=SEGMENT,
  gap=GAP,
  query_segment=QUERY_SEGMENT,
  query_events=QUERY_EVENTS,
)
COUNTED = CODES * (CODES > 1)


def pasts() -> list[list[list[int]]]:
  """The events with a value that each site of each row sees, oldest first."""
  out = []
  for b in range(2):
    ends = [(SEGMENT[b, i], i + 1) for i in range(L)]
    first = {u: int(np.argmax(SEGMENT[b] == u)) for u in (1, 2)}
    ends += [(u, first[u] + n) if u else (0, 0) for u, n in zip(QUERY_SEGMENT[b], QUERY_EVENTS[b])]
    out.append([[i for i in range(first.get(u, 0), end) if COUNTED[b, i] and u] for u, end in ends])
  return out


def memory(*kinds: str) -> HeadMemory:
  return HeadMemory(kinds, 4, 1, SIZE, rngs=nnx.Rngs(0))


def test_a_gain_starts_at_one_and_follows_the_state() -> None:
  made = memory("repeat", "recent")
  np.testing.assert_array_equal(made.gain(jnp.ones((2, 3, 4))), np.ones((2, 3, 2)))
  without = HeadMemory(("repeat", "follow"), 4, 1, SIZE, repeats=False, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(without.gain(jnp.ones((1, 1, 4)))[0, 0], [-1, 1])
  made.gain.kernel[...] = jnp.ones((4, 2))
  np.testing.assert_array_equal(made.gain(jnp.ones((1, 1, 4))), np.full((1, 1, 2), 5))


def test_own_values_count_at_every_site() -> None:
  repeat, recent = memory("repeat", "recent").counts(ROW, training=True)
  found, faded = dense(Remembered(*map(np.asarray, repeat))), dense(Remembered(*map(np.asarray, recent)))
  for b, row in enumerate(pasts()):
    for site, past in enumerate(row):
      count, fresh = np.zeros(SIZE), np.zeros(SIZE)
      for k, i in enumerate(reversed(past)):
        count[COUNTED[b, i]] += 1
        fresh[COUNTED[b, i]] += FADE**k
      for got, own in ((found, count), (faded, fresh)):
        wanted = np.log1p((SIZE - 2) * own / max(own.sum(), 1))[2:]
        np.testing.assert_allclose(got[b, site], wanted, atol=1e-5)
  assert found.max() > 1


def follow_rows(rule: FollowRule) -> FollowRows:
  """Counts that every value of the rows has of every other one, so that own pairs can be taken out of them."""
  rng = np.random.default_rng(0)
  code, number = np.zeros((SIZE, FOLLOWERS), np.int32), np.zeros((SIZE, FOLLOWERS), np.float32)
  code[3:10, :6], number[3:10, :6] = np.array([9, 8, 7, 6, 5, 300]), rng.random((7, 6)) + 5
  return FollowRows(code, number, rng.random(SIZE).astype(np.float32), rng.random(SIZE).astype(np.float32), rule)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("simultaneous", [0.0, 1.0])
def test_followers_of_the_last_values_count_without_the_own_pairs(training: bool, simultaneous: float) -> None:
  rule = FollowRule(decay=0.8, window=3.0, backward=0.5, fade=0.6, last=3.0, simultaneous=simultaneous)
  rows, made = follow_rows(rule), memory("follow")
  made.follow.fill(rows)
  (counts,) = made.counts(ROW, training=training)
  found = dense(Remembered(*map(np.asarray, counts)))

  for b, row in enumerate(pasts()):
    own = np.zeros((3, SIZE, SIZE))
    for user in (1, 2) if training else ():
      events = [i for i in range(L) if COUNTED[b, i] and SEGMENT[b, i] == user]
      times = np.cumsum(GAP[b])
      moments = np.unique([times[i] for i in events], return_inverse=True)[1] if simultaneous else range(len(events))
      for x, i in enumerate(events):
        for y in range(x + 1, min(x + 3, len(events) - 1) + 1):
          apart = moments[y] - moments[x]
          if apart > 0:
            own[user, COUNTED[b, i], COUNTED[b, events[y]]] += 0.8**apart
            own[user, COUNTED[b, events[y]], COUNTED[b, i]] += 0.5 * 0.8**apart
    for site, past in enumerate(row):
      count = np.zeros(SIZE)
      user = SEGMENT[b, past[0]] if past else 0  # pairs of both users may lie in one row
      for k, i in enumerate(reversed(past[-3:])):
        value = COUNTED[b, i]
        there = rows.code[value] > 0
        count[rows.code[value][there]] += 0.6**k * rows.number[value][there]
        for j in rows.code[value][there]:
          count[j] -= 0.6**k * own[user, value, j] * rows.out[value] * rows.into[j]
      np.testing.assert_allclose(found[b, site], np.log1p(np.maximum(count, 0))[2:], atol=1e-5, err_msg=f"{b} {site}")
  assert found.max() > 1


def test_codes_beyond_what_a_float_holds_come_back_whole() -> None:
  codes = np.array([[2**31 - 2, 2**24 + 1, 16_777_217, 4_095]], np.int32)
  rows = FollowRows(np.repeat(codes, SIZE, 0), np.ones((SIZE, 4)), np.ones(SIZE), np.ones(SIZE), FollowRule())
  table = FollowTable(SIZE)
  table.fill(rows)
  found = table(jnp.full((1, 1), 5))
  assert found.code[0, 0, :4].tolist() == codes[0].tolist() and not found.code[0, 0, 4:].any()


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_rows_of_followers_are_spread_over_devices(sizes: tuple[int, int, int]) -> None:
  rows, codes = follow_rows(FollowRule()), np.arange(16 * 8, dtype=np.int32).reshape(8, 16) + SIZE - 8 * 16
  codes[0, :8] = [0, 1, 3, 4, 9, 9, 10, 5]

  def look_up(codes: jax.Array) -> FollowRows:
    made = FollowTable(SIZE, 8)
    made.fill(rows)
    return made(codes)

  alone = look_up(codes)
  with jax.set_mesh(device_mesh.make_mesh(config.Mesh(*sizes))):
    spread = jax.jit(look_up)(codes)
  for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
    np.testing.assert_array_equal(a, b)
  assert alone.code[0, 2, :6].tolist() == [9, 8, 7, 6, 5, 300] and not alone.code[0, :2].any()
