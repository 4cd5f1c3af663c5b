"""The task kind `event_label`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

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
class EventLabel(LabelledTask):
  """The value of `field` in the next event that has it, such as a click or a rating, before it is known.

  With `positive` (for a vocabulary field) or `at_least` (for a numeric one) the answer is yes or no. Otherwise it is
  the number itself. It may depend on the user's state before the event and on the fields `given` of the event itself.
  A snapshot asks about the `per_snapshot` events that follow it, each from the state at the snapshot.
  """

  kind: ClassVar[str] = "event_label"
  asks_at_events: ClassVar[bool] = True
  about_events: ClassVar[bool] = True

  field: str = ""
  positive: tuple[str, ...] = ()
  at_least: float | None = None
  given: tuple[str, ...] = ()  # categorical fields of the event that are known beforehand, such as the item shown
  per_snapshot: int = 10

  @property
  def answer(self) -> Answer:
    """See `Task`."""
    return "binary" if self.positive or self.at_least is not None else "regression"

  @property
  def given_fields(self) -> tuple[str, ...]:
    """See `Task`."""
    return self.given

  @property
  def asked_events(self) -> int:
    """See `Task`."""
    return self.per_snapshot

  def check(self, path: str, config: Config) -> None:
    """See `Task`."""
    data = config.data
    for name in (self.field, *self.given):
      require_single_values(path, name, data)
    require_event_field(path, self.field, data)
    require(self.field in data.fields, f"{path}.field={self.field!r} is not a field{nearest(self.field, data.fields)}")
    kind = data.fields[self.field].kind
    if self.positive:
      require(kind == "vocabulary", f"{path}.positive needs a vocabulary field; {self.field!r} is {kind}.")
      require(self.at_least is None, f"{path}: positive and at_least exclude each other; keep one.")
      require_no_buckets(path, self.field, data, " with input=False")
    else:
      require(kind == "numeric", f"{path}: name the values of {self.field!r} that are positive; it is a {kind} field.")
    for name in self.given:
      require(name in data.fields, f"{path}.given: {name!r} is not a field{nearest(name, data.fields)}")
      require(
        data.fields[name].kind != "numeric", f"{path}.given: {name!r} is numeric; only categorical fields can be."
      )
      require(data.fields[name].input, f"{path}.given: {name!r} is no input, so it has no embeddings.")
      require(name != self.field, f"{path}.given holds {name!r}, the field that is asked for.")
    require(self.per_snapshot > 0, f"{path}.per_snapshot={self.per_snapshot} must be positive.")
    require_following_events(path, data)
