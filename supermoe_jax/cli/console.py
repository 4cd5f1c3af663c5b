"""Prints the package's messages while a command runs; without a command, the user's own logging setup handles them."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
from collections.abc import Iterator


class MessagePrinter(logging.Handler):
  """A handler that prints each message to standard output, with "warning: " before warnings and errors.

  It writes to the current `sys.stdout`, as `print` does, and an error of standard output reaches the caller.
  """

  def emit(self, record: logging.LogRecord) -> None:
    """Prints the message of a record."""
    print(f"{'warning: ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}")


def output_is_unread() -> bool:
  """Returns whether the reader of standard output has gone; if so, sends what is left of the output nowhere."""
  out = sys.stdout.fileno()
  pipe = select.poll()
  pipe.register(out, 0)  # errors are reported whatever is asked for
  if not any(event & select.POLLERR for _, event in pipe.poll(0)):
    return False
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, out)
  os.close(nowhere)
  return True


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
