"""Shows progress bars of long work: always in the command, and in the library only if the caller asks for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

_shown = False


@contextlib.contextmanager
def shown(show: bool = True) -> Iterator[None]:
  """Shows the bars that begin within the block, or hides them if `show` is False."""
  global _shown
  before, _shown = _shown, show
  try:
    yield
  finally:
    _shown = before


class ProgressBar(tqdm):
  """A `tqdm` bar on standard error that is silent unless bars are `shown`."""

  def __init__(self, *arguments: Any, disable: bool | None = False, **named: Any):
    """See `tqdm`; `disable=None` shows the bar on a terminal only."""
    super().__init__(*arguments, disable=disable if _shown else True, **named)
