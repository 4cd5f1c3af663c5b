"""Programs for TPU pods, compiled ahead of time by XLA:TPU on this machine (`make test-all` installs libtpu)."""

import pytest

from tests.fixtures import tpu_compiler


@pytest.fixture(scope="module")
def compiled() -> dict:
  """What the script `tpu_layers` found."""
  return tpu_compiler.output("tpu_layers")


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_ragged_compiles_for_a_pod_and_sends_tokens_as_they_are(compiled: dict, axis_type: str) -> None:
  collectives = compiled[f"ragged {axis_type}"]
  assert collectives["ragged-all-to-all"] == 4  # there and back, forward and backward
  assert "all-gather" not in collectives


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_all_to_all_compiles_for_a_pod_without_gathering(compiled: dict, axis_type: str) -> None:
  collectives = compiled[f"all_to_all {axis_type}"]
  assert collectives["all-to-all"] == 4
  assert "all-gather" not in collectives


@pytest.mark.slow
def test_dropless_compiles_for_a_pod_and_moves_weights_not_tokens(compiled: dict) -> None:
  assert compiled["dropless"]["all-gather"] >= 1
  assert not {"all-to-all", "ragged-all-to-all"} & set(compiled["dropless"])


@pytest.mark.slow
@pytest.mark.parametrize("length", [264, 2048])
def test_attention_with_its_heads_spread_only_sums(compiled: dict, length: int) -> None:
  assert set(compiled[f"attention {length}"]) == {"all-reduce"}


@pytest.mark.slow
def test_only_the_data_axis_crosses_slices(compiled: dict) -> None:
  assert compiled["slices by data index"] == [[0], [0], [1], [1]]


@pytest.mark.slow
def test_a_table_compiles_for_a_pod_in_place_and_exchanges_ids_rows_and_gradients_only(compiled: dict) -> None:
  found = compiled["table"]
  own = (1 << 29) * (128 * 2 + 4) // 16
  assert found["arguments"] < 1.01 * own and found["aliased"] > 0.99 * own
  assert found["temp"] < own / 20
  assert found["all-to-all"] == 4 * 3  # ids and rows; rows and gradients; each along three axes of the mesh
  assert "all-reduce" not in found or found["all-reduce"] <= 2  # the number of rounds
