"""Parses and checks requirements on a probe's scores, such as `auc>=0.8`, `churn.auc>=0.8` or `auc>=aggregates`."""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from supermoe_jax.errors import nearest
from supermoe_jax.evaluation.metrics import LOWER_IS_BETTER

METRICS = ("auc", "average_precision", "log_loss", "ece", "accuracy", "macro_f1", "rmse", "mae", "r2")

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
  ">=": operator.ge,
  "<=": operator.le,
  ">": operator.gt,
  "<": operator.lt,
}
_FORM = re.compile(r"\s*(?:(?P<label>.+)\.)?(?P<metric>\w+)\s*(?P<sign>>=|<=|>|<)\s*(?P<target>[^<>=\s]+)\s*")
_EXAMPLES = "write it as 'auc>=0.8', 'churn.auc>=0.8' or 'auc>=aggregates'"


class Requirement(NamedTuple):
  """A parsed requirement.

  Attributes:
    text: the requirement as it was written.
    label: a column, a glob of columns, or `mean(GLOB)`; None: every column that has the metric.
    metric: one of `METRICS`.
    sign: `>=`, `<=`, `>` or `<`.
    target: a number, or the name of a comparison.
  """

  text: str
  label: str | None
  metric: str
  sign: str
  target: float | str


def parse_requirement(text: str) -> Requirement:
  """Parses a requirement.

  Raises:
    ValueError: it is malformed.
  """
  found = _FORM.fullmatch(text)
  if found is None:
    raise ValueError(f"{text!r} is no requirement; {_EXAMPLES}")
  metric = found["metric"]
  if metric not in METRICS:
    raise ValueError(f"{text!r} names the unknown metric {metric!r}{nearest(metric, METRICS)}")
  target: float | str = found["target"]
  if re.match(r"[-+.]?\d", found["target"]):
    try:
      target = float(found["target"])
    except ValueError:
      raise ValueError(f"{text!r}: {found['target']!r} is no number; {_EXAMPLES}") from None
  return Requirement(text.strip(), found["label"], metric, found["sign"], target)


def check_names(required: Collection[Requirement], beside: Collection[str], labels: Collection[str]) -> None:
  """Raises ValueError for a requirement whose comparison is not in `beside`, or whose label is not in `labels`."""
  for r in required:
    if isinstance(r.target, str) and r.target not in beside:
      raise ValueError(f"{r.text!r}: {r.target!r} is not compared here{nearest(r.target, beside)}")
    if r.label is not None and not _matching(r.label, labels):
      raise ValueError(f"{r.text!r} names the label {r.label!r}, which is not probed{nearest(r.label, labels)}")


def _matching(pattern: str, labels: Collection[str]) -> list[str]:
  return [pattern] if pattern in labels else [n for n in labels if fnmatch.fnmatchcase(n, pattern)]


def judge_requirements(required: Collection[Requirement], result: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Checks each requirement against the result of a probe.

  The best model at the metric counts, both for the judged vectors and for a comparison. A label that could not be
  measured fails the requirements that name it.

  Returns: for each requirement `text`, `met`, and `failed`, which holds a line for each label that fails it.
  """
  out = []
  for r in required:
    measured = {**result["labels"], **({} if r.label is None else result["means"])}
    failed, seen = [], 0
    for name in measured if r.label is None else _matching(r.label, [*measured, *result["not_measured"]]):
      if name not in measured:
        seen += 1
        failed.append(f"{name} was not measured: {result['not_measured'][name]}")
        continue
      scores = measured[name]["scores"]
      value = best_over_models(scores[result["judged"]], r.metric)
      if value is None and r.label is None:
        continue  # a metric of labels of another kind
      seen += 1
      limit = best_over_models(scores[r.target], r.metric) if isinstance(r.target, str) else r.target
      if value is None or limit is None:
        failed.append(f"{name} has no {r.metric}")
      elif not _OPERATORS[r.sign](value, limit):
        against = f"{r.target} {limit:.4f}" if isinstance(r.target, str) else f"{limit:g}"
        failed.append(f"{name} has {r.metric} {value:.4f}, not {r.sign} {against}")
    if not seen:
      failed.append(f"no label has {r.metric}")
    out.append({"text": r.text, "met": not failed, "failed": failed})
  return out


def best_over_models(models: Mapping[str, Mapping[str, Any]], metric: str) -> float | None:
  """Returns the best value of a metric over models; None if no model has it."""
  values = [m[metric]["value"] for m in models.values() if metric in m and m[metric]["value"] is not None]
  return (min if metric in LOWER_IS_BETTER else max)(values, default=None)
