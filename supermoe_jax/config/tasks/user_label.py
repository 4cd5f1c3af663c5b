"""The task kind `user_label`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

from supermoe_jax.config.tasks.task import Answer, LabelledTask, require

if TYPE_CHECKING:
  from supermoe_jax.config.schema import Config


@dataclasses.dataclass(frozen=True)
class UserLabel(LabelledTask):
  """The value of the user table's `column`; users without a value have no label.

  `binary`: whether it is one of `positive`. `multiclass`: which of the values that training users have.
  `regression`: the number, standardised by the training users' mean and deviation.
  """

  kind: ClassVar[str] = "user_label"

  column: str = ""
  type: Literal["binary", "multiclass", "regression"] = "binary"
  positive: tuple[str, ...] = ()

  @property
  def answer(self) -> Answer:
    """See `Task`."""
    return self.type

  @property
  def user_column(self) -> str:
    """See `Task`."""
    return self.column

  def check(self, path: str, config: Config) -> None:
    """See `Task`."""
    require(config.data.users is not None, f"{path}: a user label needs config.data.users.")
    require(bool(self.column), f"{path}.column is empty: name the user table's column.")
    for name, field in config.data.fields.items():
      require(
        field.table == "events" or not field.input or (field.column or name) != self.column,
        f"{path}.column={self.column!r} is also the column of the input config.data.fields.{name}, which would tell "
        f"the label; leave one of the two out, or set config.data.fields.{name}.input=False.",
      )
    require(
      bool(self.positive) or self.type != "binary",
      f"{path}.positive is empty: name the values that count as positive, or set type='multiclass' or 'regression'.",
    )
    require(
      not self.positive or self.type == "binary", f"{path}.positive has no meaning with type={self.type!r}; remove it."
    )
