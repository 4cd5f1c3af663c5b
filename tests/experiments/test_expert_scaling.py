"""The study of the number of experts: its runs differ in the experts alone, and its picture shows what it measured."""

import pathlib
from typing import Any

import pytest

from supermoe_jax import config
from tests.fixtures import scripts

EXPERIMENTS = scripts.BENCHMARKS.parent


def rows() -> list[dict[str, Any]]:
  """Runs of two tasks. One expert knows nothing of `noise`. At `known` four experts gain 4, 5 and 6 % of its lead."""
  out = []
  for experts in (1, 4):
    for seed in (0, 1, 2):
      score = 0.7 + (0.008 + 0.002 * seed if experts > 1 else 0)
      shares = {"young": [0.4, 0.2, 0.2, 0.2], "old": [0.1, 0.3, 0.3, 0.3]} if experts > 1 and seed == 0 else None
      out.append(
        {
          "log": "simulated",
          "experts": experts,
          "seed": seed,
          "metric": {"known": "auc", "noise": "auc"},
          "test": {"known": score, "noise": 0.5 + 0.01 * (seed - 1)},
          "constant": {"known": 0.5, "noise": 0.5},
          "parameters": 1000 * experts,
          "dropped_share": 0.01,
          "segments": shares,
        }
      )
  return out


def test_gains_are_of_tasks_beyond_chance_and_the_picture_names_logs_and_segments(tmp_path: pathlib.Path) -> None:
  script = scripts.load(EXPERIMENTS / "expert_scaling.py")
  found = script.gains(rows())
  assert list(found) == [4] and list(found[4]) == ["known"]
  assert found[4]["known"] == pytest.approx([4, 5, 6])
  assert any("| 4 | 4,000 | 1.0 % | +5.0 % (+2.5 to +7.5) | 0.7100 |" in line for line in script.table(rows()))
  script.picture({"simulated": rows()}, tmp_path / "experts")
  svg = (tmp_path / "experts.svg").read_text()
  assert "simulated" in svg or "<use" in svg


def test_every_model_has_as_many_active_parameters(cfg: config.Config) -> None:
  script = scripts.load(EXPERIMENTS / "expert_scaling.py")
  active = {script.with_experts(cfg, e, 0).model for e in script.EXPERTS}
  assert {m.experts for m in active} == set(script.EXPERTS)
  assert len({m.experts_per_token * m.d_expert for m in active}) == 1
