"""Renders self-contained HTML pages from the package's Jinja templates and their common style."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2


def render_template(template: str, values: Mapping[str, Any], filters: Mapping[str, Any]) -> str:
  """Renders one of the package's templates with text escaped. A name that `values` lacks raises an error."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters.update(filters)
  return environment.get_template(template).render(values)
