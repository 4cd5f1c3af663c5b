"""What preparation tells of a dataset, from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN_CLASSES = 5  # of a task


def render(manifest: Mapping[str, Any]) -> str:
  """Says in a few lines what was prepared and what to know about it."""
  lengths, reading = manifest["lengths"], manifest["reading"]
  by_user = manifest["config"]["data"]["split"]["mode"] == "user"
  lines = [
    f"{manifest['users']:,} users, {manifest['events']:,} events from {manifest['log']['first']} to "
    f"{manifest['log']['last']} (median {lengths['p50']:.0f} a user, at most {lengths['p100']:.0f}); "
    f"{reading['tie_rate']:.1%} share user and time",
    "snapshots: " + ", ".join(f"{n:,} {split}" for split, n in manifest["snapshots"].items()),
  ]
  if repeated := manifest.get("repeated_snapshots"):
    lines.append(f"  {repeated:,} at the moment of another (events at equal times) were left out")
  for task, splits in manifest["labels"].items():
    lines.append(f"  {task}: " + ", ".join(_label_text(split, count) for split, count in splits.items()))
  for task, count in manifest["user_table"].get("user_labels", {}).items():
    if unseen := count.get("unseen_class"):
      lines.append(f"  {task}: {unseen:,} users have a class that no training user has; they have no label")
    if dropped := count.get("dropped"):
      lines.append(f"  {task}: {dropped:,} users' values are no numbers; they have no label")
  for name, field in manifest["fields"].items():
    if field["oov_after"]:
      where = "of users outside training were unseen" if by_user else "after the training period were unseen"
      lines.append(f"field {name}: {field['oov_after']:.2%} of the values {where} in it")
    if cut := field.get("values_cut"):
      many = manifest["config"]["data"]["fields"][name]["many"]
      lines.append(f"field {name}: {cut:,} values of lists longer than {many} were cut off")
  lines += [f"warning: {w}" for w in manifest["warnings"]]
  lines.append(f"prepared in {manifest['seconds']:.0f} s: {manifest['config']['data']['path']}")
  return "\n".join(lines)


def _label_text(split: str, count: Mapping[str, Any]) -> str:
  text = f"{split} {count['known']:,} known"
  if "classes" in count:
    return f"{text} ({', '.join(f'{n:,} {value}' for value, n in list(count['classes'].items())[:SHOWN_CLASSES])})"
  if "mean" in count:
    return f"{text} (mean {count['mean']:.3g}, deviation {count['std']:.3g}, standardised)" if count["known"] else text
  kind = next(k for k in count if k != "known")
  return f"{text} ({count[kind]:,} {kind.replace('_', ' ')})"
