"""Parses conditions on events, such as `behavior == 'buy' and amount >= 50`.

A condition compares fields with constants: `==`, `!=`, `<`, `<=`, `>`, `>=`, `in (…)` and `not in (…)`. Comparisons
join by `and`, `or`, `not` and parentheses, as in Python. An event that lacks a field fails every comparison of it.

`sum(amount) >= 50` compares a number of the event's whole moment, such as a basket. The moment of an event holds all
events of the same user, source and time. `MOMENT_FUNCTIONS` lists what can be computed over a moment.

The same language restricts a task to samples by another task's label (`LabelledTask.sample_space`).
"""

from __future__ import annotations

import ast
import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from supermoe_jax.errors import ConfigError

# The operators that compare with one constant, and what they mean for numbers and arrays.
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
  "==": operator.eq,
  "!=": operator.ne,
  "<": operator.lt,
  "<=": operator.le,
  ">": operator.gt,
  ">=": operator.ge,
}

# The functions over the events of a moment. All but `count()` take a numeric field, and pass over events without it.
MOMENT_FUNCTIONS = ("sum", "mean", "max", "min", "count")

_SYMBOLS: dict[type[ast.cmpop], str] = {
  ast.Eq: "==",
  ast.NotEq: "!=",
  ast.Lt: "<",
  ast.LtE: "<=",
  ast.Gt: ">",
  ast.GtE: ">=",
  ast.In: "in",
  ast.NotIn: "not in",
}

# The operator of `constant < field`, written the other way round.
_MIRRORED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}

Constant = str | float


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A comparison with constants of a field, or of a function of it over the event's moment.

  Attributes:
    field: the field; empty for `count()`.
    operator: one of `OPERATORS` (one constant), `in` or `not in`.
    constants: the constants.
    function: one of `MOMENT_FUNCTIONS`; empty where the event's own value is compared.
  """

  field: str
  operator: str
  constants: tuple[Constant, ...]
  function: str = ""


@dataclasses.dataclass(frozen=True)
class Negation:
  """The negation of a condition."""

  part: Condition


@dataclasses.dataclass(frozen=True)
class AllOf:
  """A condition that holds where all `parts` hold."""

  parts: tuple[Condition, ...]


@dataclasses.dataclass(frozen=True)
class AnyOf:
  """A condition that holds where one of `parts` holds."""

  parts: tuple[Condition, ...]


Condition = Comparison | Negation | AllOf | AnyOf


def parse_condition(text: str, key: str) -> Condition:
  """Returns the parsed form of a condition; `key` is the config key that error messages name.

  Raises:
    ConfigError: the text is no condition.
  """
  try:
    tree = ast.parse(text.strip(), mode="eval").body
  except SyntaxError as error:
    hint = "; write == to compare" if "=" in text and not any(o in text for o in ("==", "!=", "<=", ">=")) else ""
    raise ConfigError(
      f"{key}={text!r} cannot be read ({error.msg}){hint}; write it as in \"type == 'buy' and amount >= 50\"."
    ) from None
  return _parsed(tree, text, key)


class SampleSpace(NamedTuple):
  """A parsed `sample_space`: a comparison of the label of `task` with `value`."""

  task: str
  operator: str
  value: float


def parse_sample_space(text: str, key: str = "sample_space") -> SampleSpace | None:
  """Returns the parsed form of a sample space such as `click == 1`; None for an empty text.

  Raises:
    ConfigError: the text is no comparison of one task with one number; the message names `key`.
  """
  if not text:
    return None
  found = parse_condition(text, key)
  if any(compared.function for compared in comparisons(found)):
    raise ConfigError(
      f"{key}={text!r} must compare one task's label with one number, as in 'click == 1'; a function of a moment's "
      "events belongs into the task's 'where'."
    )
  if not isinstance(found, Comparison) or found.operator not in OPERATORS or isinstance(found.constants[0], str):
    raise ConfigError(f"{key}={text!r} must compare one task's label with one number; write it as in 'click == 1'.")
  return SampleSpace(found.field, found.operator, found.constants[0])


def comparisons(condition: Condition) -> list[Comparison]:
  """Returns all comparisons of a condition, from left to right."""
  if isinstance(condition, Comparison):
    return [condition]
  parts = (condition.part,) if isinstance(condition, Negation) else condition.parts
  return [c for part in parts for c in comparisons(part)]


def _parsed(node: ast.expr, text: str, key: str) -> Condition:
  if isinstance(node, ast.BoolOp):
    parts = tuple(_parsed(value, text, key) for value in node.values)
    return AllOf(parts) if isinstance(node.op, ast.And) else AnyOf(parts)
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
    return Negation(_parsed(node.operand, text, key))
  if isinstance(node, ast.Compare):
    sides = [node.left, *node.comparators]
    pairs = tuple(
      _comparison(left, _SYMBOLS.get(type(op), ""), right, text, key)
      for left, op, right in zip(sides, node.ops, sides[1:])
    )
    return pairs[0] if len(pairs) == 1 else AllOf(pairs)
  raise _refused(ast.unparse(node), "is no comparison", text, key)


def _comparison(left: ast.expr, symbol: str, right: ast.expr, text: str, key: str) -> Comparison:
  if not symbol:
    raise _refused(f"{ast.unparse(left)} … {ast.unparse(right)}", "uses another operator", text, key)
  if symbol in ("in", "not in"):
    if not isinstance(left, ast.Name) or not isinstance(right, ast.Tuple | ast.List | ast.Set) or not right.elts:
      raise _refused(ast.unparse(right), "is no list of constants such as ('a', 'b') after a field", text, key)
    constants = tuple(_constant(e, text, key) for e in right.elts)
    if len({type(c) for c in constants}) > 1:
      raise _refused(ast.unparse(right), "mixes texts and numbers", text, key)
    return Comparison(left.id, symbol, constants)
  if isinstance(right, ast.Name | ast.Call) and not isinstance(left, ast.Name | ast.Call):
    left, right, symbol = right, left, _MIRRORED[symbol]
  if isinstance(left, ast.Call):
    function, field = _function(left, text, key)
    number = _constant(right, text, key)
    if isinstance(number, str):
      raise _refused(ast.unparse(right), f"is a text; compare {ast.unparse(left)} with a number", text, key)
    return Comparison(field, symbol, (number,), function)
  if not isinstance(left, ast.Name):
    raise _refused(ast.unparse(left), "is no field", text, key)
  return Comparison(left.id, symbol, (_constant(right, text, key),))


def _function(node: ast.Call, text: str, key: str) -> tuple[str, str]:
  """Returns the function over a moment, and the field it takes, which is empty for `count()`."""
  name = ast.unparse(node.func)
  if name not in MOMENT_FUNCTIONS:
    raise _refused(
      ast.unparse(node), f"is no field; functions of a moment's events are {', '.join(MOMENT_FUNCTIONS)}", text, key
    )
  if name == "count":
    if node.args or node.keywords:
      raise _refused(ast.unparse(node), "takes no field; write count() for the events of the moment", text, key)
    return name, ""
  if len(node.args) != 1 or node.keywords or not isinstance(node.args[0], ast.Name):
    raise _refused(ast.unparse(node), f"must name one field, as in {name}(amount)", text, key)
  return name, node.args[0].id


def _constant(node: ast.expr, text: str, key: str) -> Constant:
  sign = 1.0
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
    node, sign = node.operand, -1.0
  if isinstance(node, ast.Constant):
    if isinstance(node.value, str) and sign > 0:
      return node.value
    if isinstance(node.value, int | float) and not isinstance(node.value, bool):
      return sign * float(node.value)
  hint = f"; put a text in quotes: '{node.id}'" if isinstance(node, ast.Name) else ""
  raise _refused(ast.unparse(node), f"is no text and no number{hint}", text, key)


def _refused(part: str, why: str, text: str, key: str) -> ConfigError:
  return ConfigError(
    f"{key}={text!r}: {part!r} {why}. A condition compares fields with constants, as in "
    "\"type == 'buy' and amount >= 50\"."
  )
