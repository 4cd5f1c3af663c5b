"""Parts of a batch, one after the other, tell what the whole batch tells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supermoe_jax.training.step_metrics import PassReport, accumulate_over_parts

KEY = jax.random.key(0)


def told(rows: dict[str, jax.Array], key: jax.Array) -> tuple[dict[str, jax.Array], PassReport]:
  """A mean over rows, sums and means of them, and what a key draws."""
  x = rows["x"]
  draw = jax.random.uniform(key)
  return {"gradient": x.mean(axis=0)}, PassReport(
    {"sum": x.sum(), "rows": jnp.int32(len(x))}, {"mean": x.mean(), "draw": draw}
  )


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_means_are_those_of_the_batch_and_sums_add_up(parts: int) -> None:
  rows = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(12, 5)), jnp.float32)}
  value, found = accumulate_over_parts(told, rows, KEY, parts)
  wanted, whole = told(rows, KEY)
  np.testing.assert_allclose(value["gradient"], wanted["gradient"], rtol=1e-5, atol=1e-6)
  assert float(found.sums["sum"]) == pytest.approx(float(whole.sums["sum"]), rel=1e-5)
  assert int(found.sums["rows"]) == 12
  assert float(found.means["mean"]) == pytest.approx(float(whole.means["mean"]), rel=1e-5)


def test_each_part_draws_with_a_key_of_its_own() -> None:
  rows = {"x": jnp.zeros((6, 1))}
  _, alone = accumulate_over_parts(told, rows, KEY, 1)
  _, thrice = accumulate_over_parts(told, rows, KEY, 3)
  assert float(alone.means["draw"]) == float(jax.random.uniform(KEY))
  draws = [float(jax.random.uniform(jax.random.fold_in(KEY, i))) for i in range(3)]
  assert float(thrice.means["draw"]) == pytest.approx(np.mean(draws)) and len(set(draws)) == 3


def test_every_row_is_in_one_part_which_holds_some_of_each_devices_rows() -> None:
  seen: list[np.ndarray] = []

  def look(rows: jax.Array, key: jax.Array) -> tuple[jax.Array, PassReport]:
    del key
    jax.debug.callback(lambda r: seen.append(np.asarray(r)), rows)
    return rows.sum(), PassReport({}, {})

  accumulate_over_parts(look, jnp.arange(8.0), KEY, 2)
  jax.effects_barrier()
  parts = [set(r.tolist()) for r in seen]
  assert set.union(*parts) == set(range(8)) and not set.intersection(*parts)
  assert all(len(part & {2 * d, 2 * d + 1}) == 1 for part in parts for d in range(4))  # of four devices with two each
