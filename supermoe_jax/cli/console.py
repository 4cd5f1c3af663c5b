"""Prints the package's messages while a command runs; without a command, the user's own logging setup handles them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


class MessagePrinter(logging.Handler):
  """A handler that prints each message to standard output, with "warning: " before warnings and errors.

  It writes to the current `sys.stdout`, as `print` does, and an error of standard output reaches the caller.
  """

  def emit(self, record: logging.LogRecord) -> None:
    """Prints the message of a record."""
    print(f"{'warning: ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}")


@contextlib.contextmanager
def printed_messages() -> Iterator[None]:
  """Prints messages of level INFO and above of the logger "supermoe_jax" and its children within the block."""
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
