"""Errors of a run that its user can act on."""


class RunError(RuntimeError):
  """A run directory that cannot be used, or a run that cannot go on; the message says what to do."""
