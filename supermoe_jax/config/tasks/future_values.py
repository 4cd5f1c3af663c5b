"""The task kind `future_values`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from supermoe_jax.config.tasks.task import (
  Answer,
  LabelledTask,
  require,
  require_event_field,
  require_no_buckets,
  require_single_values,
  require_window,
)
from supermoe_jax.errors import nearest

if TYPE_CHECKING:
  from supermoe_jax.config.schema import Config


@dataclasses.dataclass(frozen=True)
class FutureValues(LabelledTask):
  """Which of the `top` most frequent values of `field` occur in [τ, τ + horizon_days): one binary label each."""

  kind: ClassVar[str] = "future_values"

  field: str = ""
  top: int = 50
  horizon_days: float = 28.0

  @property
  def answer(self) -> Answer:
    """See `Task`."""
    return "multilabel"

  @property
  def asked_values(self) -> int:
    """See `Task`."""
    return self.top

  @property
  def horizon(self) -> float | None:
    """See `Task`."""
    return self.horizon_days

  def check(self, path: str, config: Config) -> None:
    """See `Task`."""
    data = config.data
    vocabularies = [n for n, f in data.fields.items() if f.kind == "vocabulary"]
    require_single_values(path, self.field, data)
    require_event_field(path, self.field, data)
    require(
      self.field in vocabularies,
      f"{path}.field={self.field!r} is not a vocabulary field{nearest(self.field, vocabularies)}",
    )
    require_window(path, self.horizon_days, data)
    require_no_buckets(path, self.field, data, " with input=False")
    require(self.top > 0, f"{path}.top={self.top} must be positive.")
