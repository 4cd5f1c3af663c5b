"""The task kind `next_event`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

from supermoe_jax.config.tasks.task import (
  Answer,
  LabelledTask,
  require,
  require_event_field,
  require_following_events,
  require_no_buckets,
  require_single_values,
)
from supermoe_jax.errors import nearest

if TYPE_CHECKING:
  from supermoe_jax.config.schema import Config


@dataclasses.dataclass(frozen=True)
class NextEvent(LabelledTask):
  """The value of `field` in the next event that has one: softmax over its vocabulary, ranked in full."""

  kind: ClassVar[str] = "next_event"
  asks_at_events: ClassVar[bool] = True

  field: str = ""
  exclude_seen: bool = False  # evaluation: values already in the user's history cannot be recommended
  softmax: Literal["full", "sampled"] = "full"  # training loss; sampled: with log-Q correction
  negatives: int = 1024  # sampled: values drawn a batch (or up to twice as many), shared by its sites
  sampling: Literal["log_uniform", "uniform"] = "log_uniform"  # sampled: by Zipf's law of the rank by count, or evenly

  @property
  def answer(self) -> Answer:
    """See `Task`."""
    return "catalogue"

  @property
  def excludes_seen(self) -> bool:
    """See `Task`."""
    return self.exclude_seen

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
    require_no_buckets(path, self.field, data)
    require(data.fields[self.field].input, f"{path}.field={self.field!r} is no input, so it has no embeddings to rank.")
    require(self.negatives > 0, f"{path}.negatives={self.negatives} must be positive.")
    require_following_events(path, data)
