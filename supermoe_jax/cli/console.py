"""Prints the messages of the package while a command runs; without a command they go where their user sends them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


class MessagePrinter(logging.Handler):
  """Prints each record's message to standard output, and "warning: " before the message of a warning or an error.

  It writes to `sys.stdout` of the moment, as `print` does, and an error of standard output reaches the caller.
  """

  def emit(self, record: logging.LogRecord) -> None:
    """Prints the message of a record."""
    print(f"{'warning: ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}")


@contextlib.contextmanager
def printed_messages() -> Iterator[None]:
  """Prints the messages of the logger "supermoe_jax", and of those below it, from level INFO on within the block."""
  logger, printer = logging.getLogger("supermoe_jax"), MessagePrinter(logging.INFO)
  level, propagate = logger.level, logger.propagate
  logger.addHandler(printer)
  # The import of Orbax gives the root logger a handler, which would write every message to standard error once more.
  logger.propagate = False
  if logger.getEffectiveLevel() > logging.INFO:
    logger.setLevel(logging.INFO)
  try:
    yield
  finally:
    logger.propagate = propagate
    logger.setLevel(level)
    logger.removeHandler(printer)
