"""An HTML page as tests look at it."""

from __future__ import annotations

import html.parser
import re


class Page(html.parser.HTMLParser):
  """Collects a page's tags, ids and visible text."""

  VOID = ("meta", "link", "br", "img", "hr", "input")

  def __init__(self, text: str):
    super().__init__()
    self.tags: list[tuple[str, dict[str, str | None]]] = []
    self.open: list[str] = []
    self.text = ""
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if "style" not in self.open:
      self.text += data

  def all(self, tag: str) -> list[dict[str, str | None]]:
    return [attributes for name, attributes in self.tags if name == tag]


def assert_self_contained(text: str, page: Page, embedded: tuple[str, ...] = ("#", "data:image/png;base64,")) -> None:
  """The page needs nothing beside it: what it refers to begins with one of `embedded`, and every id is there once."""
  assert not any(page.all(tag) for tag in ("link", "script", "img", "iframe"))
  assert not re.search(r"@import|url\((?!#)|https?://", text)
  for _, attributes in page.tags:
    for name in ("src", "href", "xlink:href"):
      assert (attributes.get(name) or "#").startswith(embedded)
  ids = [a["id"] for _, a in page.tags if a.get("id")]
  assert len(ids) == len(set(ids))
  assert set(re.findall(r'(?:url\(|href=")#([^")]+)', text)) <= set(ids)
