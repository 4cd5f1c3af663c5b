"""What data raise that cannot be used."""


class DataError(ValueError):
  """Data that cannot be used; the message names the file, the column, the value and the remedy."""
