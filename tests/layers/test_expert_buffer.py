"""Sorts: the permutations of NumPy's stable sort, in either form."""

import jax.numpy as jnp
import numpy as np
import pytest

from supermoe_jax.layers.expert_buffer import ascending, grouping_order


@pytest.mark.parametrize("n", [0, 1, 1000])
@pytest.mark.parametrize("groups", [7, 2**31 - 1])  # the latter and a place do not go into one number
def test_the_order_is_that_of_a_stable_sort(groups: int, n: int) -> None:
  group = np.random.default_rng(0).integers(0, groups, n).astype(np.int32) // max(1, groups // 7)
  np.testing.assert_array_equal(grouping_order(jnp.asarray(group), groups), np.argsort(group, kind="stable"))
  np.testing.assert_array_equal(ascending(jnp.asarray(group)), np.sort(group))
