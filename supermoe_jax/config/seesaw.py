"""Defines the settings of a seesaw study and their defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Seesaw:
  """The runs of `supermoe seesaw`: single-task references and variants of this config, over several seeds.

  Variants and candidates are lists of overrides such as "train.weighting.method=seesaw". A task's single-task reference
  is the candidate of `single` that is best on validation. Every variant and every reference also tries the `rates` and
  keeps the one that is best on validation. Static weights are tuned for the variant named in `tuned`: in addition it
  gets the weighting that is best on validation among `static_candidates`, which are equal weights and random ones.
  With `null` the study trains the variant without overrides twice, the second time with other seeds, as the variant
  named null: their differences are chance alone.
  """

  seeds: tuple[int, ...] = (0, 1, 2)  # the first seed also tunes
  variants: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # empty: the standard variants
  single: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # empty: this config with one task
  rates: tuple[float, ...] = (0.5, 1.0, 2.0)  # factors of both learning rates to try; (1.0,): nothing is tried
  null: bool = True
  tuned: str = "tuned_static"  # empty: no variant is tuned
  static_candidates: int = 8
  static_spread: float = 3.0  # weights are drawn log-uniformly from [1/spread, spread]
