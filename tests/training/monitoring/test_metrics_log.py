"""Rows of metrics: sums first, ratios last, and the same steps in each whether or not a run was cut."""

import json
import math
import pathlib
import time

import jax
import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.models.parameters import Parameters
from supermoe_jax.training.monitoring import utilisation
from supermoe_jax.training.monitoring.metrics_log import MetricsLog, summarise_steps
from supermoe_jax.training.step_metrics import StepMetrics
from supermoe_jax.training.table_step import TableCounts
from supermoe_jax.training.task_losses import TaskLoss


def step(total: float, weight: float, dropped: int = 0, *, loss: float = 1.0, skipped: int = 0) -> StepMetrics:
  one, none = np.float32(1), np.int32(0)
  return StepMetrics(
    loss=np.float32(loss),
    tasks={"t": TaskLoss(np.float32(total), np.float32(weight))},
    weights={"t": one},
    balance_loss=one,
    z_loss=one,
    load=np.ones((1, 2), np.float32) / 2,
    entropy=np.array([0.5], np.float32),
    routed=np.array([90]),
    dropped=np.array([dropped]),
    task_dropped={},
    slice_routed=none,
    slice_dropped=none,
    events=np.int32(10),
    snapshots=np.int32(3),
    positions=np.int32(40),
    gradient_norm=one,
    learning_rate=one,
    skipped=np.int32(skipped),
    tables={"items": TableCounts(np.int32(5), np.int32(1), np.int32(0))},
  )


def test_loss_metrics_are_sums_first_and_ratios_last() -> None:
  row = summarise_steps([step(8.0, 2, 10), step(0.0, 0), step(1.0, 7)], 4, 3)
  assert row["tasks"]["t"] == {"loss": 1.0, "weight": 9, "labels_per_row": 0.75}
  assert row["dropped_share"] == pytest.approx(10 / 280)
  assert row["padding_share"] == 0.75
  assert row["tables"] == {"items": {"touched": 15, "out_of_range": 3, "lost": 0}}
  assert summarise_steps([step(0.0, 0)], 4, 1)["tasks"]["t"]["loss"] is None


def test_skipped_steps_are_named_and_leave_the_losses_alone() -> None:
  bad = step(math.nan, 3, loss=math.inf, skipped=1)
  row = summarise_steps([step(8.0, 2, loss=3.0), bad, step(1.0, 7, loss=1.0)], 4, 20)
  assert row["skipped"] == [19]
  assert row["loss"] == 2.0 and row["tasks"]["t"] == {"loss": 1.0, "weight": 9, "labels_per_row": 9 / 8}
  every = summarise_steps([bad, bad], 4, 2)
  assert every["skipped"] == [1, 2] and every["loss"] is None and every["tasks"]["t"]["loss"] is None
  json.loads(json.dumps(every), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("experts", [True, False])
def test_a_row_holds_the_same_steps_whether_or_not_the_log_was_closed_between_them(
  tmp_path: pathlib.Path, experts: bool
) -> None:
  train = config.Train(log_every=4, steps=9)
  cfg = config.Config(train=train)
  steps = [step(0.1 * i, 1 / 3, i, loss=0.7 * i) for i in range(1, 10)]
  if not experts:
    empty = {"load": np.zeros((0, 2), np.float32), "entropy": np.zeros(0, np.float32)}
    steps = [s._replace(**empty) for s in steps]
  for name in ("whole", "cut"):
    (tmp_path / name).mkdir()
  with MetricsLog(tmp_path / "whole", 0, cfg, False) as log:
    for i, metrics in enumerate(steps, 1):
      log.add(i, metrics)
  with MetricsLog(tmp_path / "cut", 0, cfg, False) as log:
    for i in range(1, 7):
      log.add(i, steps[i - 1])
      if i == 3:
        waiting = json.loads(json.dumps(log.waiting()))
  with MetricsLog(tmp_path / "cut", 3, cfg, False, waiting) as log:
    for i in range(4, 10):
      log.add(i, steps[i - 1])
  whole, cut = ([json.loads(r) for r in (tmp_path / n / "metrics.jsonl").open()] for n in ("whole", "cut"))
  assert [r["step"] for r in whole] == [4, 8, 9]
  assert [r.pop("speed")["step_ms"] is None for r in (*whole, *cut)] == [False] * 3 + [True] + [False] * 2
  assert cut == whole


@pytest.mark.parametrize("device_works", [True, False])
def test_a_batch_is_waited_for_only_while_the_device_has_nothing_to_do(
  tmp_path: pathlib.Path, device_works: bool
) -> None:
  class Loss(np.ndarray):
    """One that comes only when it is asked for."""

    ready = not device_works

    def is_ready(self) -> bool:
      return self.ready

  with MetricsLog(tmp_path, 0, config.Config(train=config.Train(log_every=3, steps=3)), False) as log:
    log.add(1, step(1, 1))
    log.add(2, step(1, 1)._replace(loss=np.ones(()).view(Loss)))
    with log.taking_input():
      time.sleep(0.1)
    row = log.add(3, step(1, 1))
  assert row is not None
  share = row["speed"]["input_wait_share"]
  assert share == 0 if device_works else share > 0.5


@pytest.mark.parametrize(
  ("kind", "wanted"), [("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("NVIDIA H100 80GB HBM3", 989e12), ("cpu", None)]
)
def test_the_peak_of_a_device_is_that_of_its_kind(kind: str, wanted: float | None) -> None:
  assert utilisation.peak_flops(kind) == wanted


def test_utilisation_is_what_the_model_asks_for_over_what_the_devices_could(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(utilisation.PEAKS, jax.devices()[0].device_kind, 1e12)
  flops = utilisation.flops_a_token(config.Model(layers=2, d_model=8, max_events=10), Parameters(200, 100, 50))
  assert flops == 6 * 50 + 6 * 2 * 8 * 10
  assert utilisation.peak_share(flops * 1e9, 2.0, 4) == pytest.approx(flops / 8000, abs=1e-4)
