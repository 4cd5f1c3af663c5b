"""Defines the errors that a user of the package can act on, and the exit codes of the `supermoe` command.

Each message names the cause (the file, column, config key and value) and a remedy. The command prints only the message;
a caller in Python catches the class, or `SupermoeError` for all errors.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterable


class SupermoeError(Exception):
  """The base of all errors whose message names a remedy for the user."""


class ConfigError(SupermoeError, ValueError):
  """A configuration that cannot be used; the message names the key and the remedy."""


class DataError(SupermoeError, ValueError):
  """Data that cannot be used; the message names the file, the column, the value and the remedy."""


class RunError(SupermoeError, RuntimeError):
  """A run directory that cannot be used, or a run that cannot go on; the message names the remedy."""


class StudyError(SupermoeError, RuntimeError):
  """A seesaw study with runs that failed; the message names them."""


class SimulationError(SupermoeError, ValueError):
  """Settings that describe no simulation; the message names the setting and the remedy."""


class Stopped(BaseException):
  """The end of a run that was asked to stop; the run is saved and can go on.

  Like `KeyboardInterrupt` this is not an `Exception`: code that handles errors must not swallow it.
  """


class ExitCode(enum.IntEnum):
  """The exit codes of the `supermoe` command."""

  OK = 0
  ERROR = 1  # a message names the remedy
  USAGE = 2  # the arguments cannot be understood
  CRASHED = 70  # `EX_SOFTWARE` of sysexits.h: one of several processes of a run ended unexpectedly
  RESUME = 75  # `EX_TEMPFAIL`: the run is sound; the same command goes on with it
  INTERRUPTED = 130  # by Ctrl-C; nothing was saved
  UNREAD = 141  # 128 + SIGPIPE, as shells report it: the reader of the output, such as `head`, has gone


# The codes with which a command ends on purpose; any other code is a crash that needs an explanation.
DELIBERATE_EXITS = (ExitCode.OK, ExitCode.ERROR, ExitCode.USAGE, ExitCode.RESUME, ExitCode.INTERRUPTED, ExitCode.UNREAD)


def nearest(name: str, valid: Iterable[str]) -> str:
  """Returns a hint such as `; did you mean 'steps'?`, or the list of valid names when none is near."""
  valid = sorted(str(v) for v in valid)
  close = difflib.get_close_matches(name, valid, n=1)
  if close:
    return f"; did you mean '{close[0]}'?"
  return f"; valid: {', '.join(valid)}" if valid else ""
