"""Files that are there whole or not at all; for directories see `data.replace`."""

from __future__ import annotations

import pathlib


def write(file: pathlib.Path, content: str | bytes) -> None:
  """Writes a file beside its place and moves it there, so that whoever reads it finds the old or the new one whole."""
  temporary = file.with_name(file.name + ".incomplete")
  temporary.write_bytes(content.encode() if isinstance(content, str) else content)
  temporary.replace(file)
