"""The task kind `future_event`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from supermoe_jax.config.tasks.task import Answer, LabelledTask, require, require_window
from supermoe_jax.errors import nearest

if TYPE_CHECKING:
  from supermoe_jax.config.schema import Config


@dataclasses.dataclass(frozen=True)
class FutureEvent(LabelledTask):
  """Whether any event of `source` happens in [τ, τ + horizon_days); `negate` for "nothing happens" (churn)."""

  kind: ClassVar[str] = "future_event"

  source: str = ""
  horizon_days: float = 28.0
  negate: bool = False

  @property
  def answer(self) -> Answer:
    """See `Task`."""
    return "binary"

  @property
  def horizon(self) -> float | None:
    """See `Task`."""
    return self.horizon_days

  def check(self, path: str, config: Config) -> None:
    """See `Task`."""
    require_window(path, self.horizon_days, config.data)
    sources = config.data.sources
    require(self.source in sources, f"{path}.source={self.source!r} is not a source{nearest(self.source, sources)}")
