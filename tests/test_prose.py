"""Docstrings, the README and the guides are in plain prose: words that nearly always mark a riddle are rare."""

import ast
import re

from tests.fixtures.imports import modules, tree
from tests.fixtures.scripts import ROOT

RIDDLE = re.compile(
  r"\b(whom|of which|so many|beside|told|says of|those who|what\b[^.;\n]{0,40}\bis that)\b", re.IGNORECASE
)

DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef


def docstrings() -> dict[str, str]:
  found = {}
  for module in modules():
    for node in ast.walk(tree(module)):
      if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
        found[f"{module}:{getattr(node, 'name', '')}:{getattr(node, 'lineno', 0)}"] = text
  return found


def test_words_that_mark_riddles_are_rare() -> None:
  pages = {page.name: page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
  texts = {**docstrings(), **pages}
  found = {name: words for name, text in texts.items() if (words := RIDDLE.findall(text))}
  assert sum(map(len, found.values())) < 40, found


def test_every_module_says_what_it_does() -> None:
  for module in modules():
    first = (ast.get_docstring(tree(module)) or "").partition("\n\n")[0]
    assert len(first.split()) >= 4 and first.rstrip().endswith((".", ":")), module


def test_no_docstring_begins_with_a_riddle() -> None:
  begun = {name: text.split()[0] for name, text in docstrings().items()}
  riddles = {name: word for name, word in begun.items() if word in ("What", "Whom", "How", "Whether", "Those", "Does")}
  assert len(riddles) < 20, riddles
