"""The task kind `contrast`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from supermoe_jax.config.tasks.task import Answer, Task, require

if TYPE_CHECKING:
  from supermoe_jax.config.schema import Config


@dataclasses.dataclass(frozen=True)
class Contrast(Task):
  """Two slices of one user's training history belong together, slices of different users do not (InfoNCE).

  It has no label and no metric. Source: CoLES, arXiv 2002.08232.
  """

  kind: ClassVar[str] = "contrast"
  has_labels: ClassVar[bool] = False

  slice_events: int = 32  # most events of a slice
  least_events: int = 4  # fewest; users with a shorter training history than two such slices have no pair
  temperature: float = 0.1

  @property
  def answer(self) -> Answer:
    """See `Task`."""
    return "contrast"

  def check(self, path: str, config: Config) -> None:
    """See `Task`."""
    require(
      1 <= self.least_events <= self.slice_events <= config.model.max_events,
      f"{path}: 1 ≤ least_events={self.least_events} ≤ slice_events={self.slice_events} ≤ "
      f"model.max_events={config.model.max_events} must hold.",
    )
    require(self.temperature > 0, f"{path}.temperature={self.temperature} must be positive.")
