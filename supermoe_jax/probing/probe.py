"""Probes embeddings on a label table, compares them with aggregates and other vectors, and gives 95 % intervals."""

from __future__ import annotations

import dataclasses
import pathlib
import time as clock
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import threadpoolctl

from supermoe_jax import config, environment
from supermoe_jax.config import format_time
from supermoe_jax.config.tables import PLAIN_TEXT
from supermoe_jax.errors import ConfigError, DataError
from supermoe_jax.probing import label_table, vectors
from supermoe_jax.probing import models as models_lib
from supermoe_jax.probing import protocol as protocol_lib
from supermoe_jax.probing.label_table import Label, LabelTable
from supermoe_jax.probing.protocol import ProbePredictions, ProbeResult, ProbeRows, Protocol, UnmeasurableLabel
from supermoe_jax.probing.vectors import UserVectors
from supermoe_jax.progress import ProgressBar

LIBRARIES = ("supermoe_jax", "numpy", "scipy", "scikit-learn", "lightgbm", "jax", "flax", "optax")

INTERVALS = {
  False: "corrected resampled t over folds (Nadeau & Bengio 2003), 95 %",
  True: "percentile bootstrap over users, 95 %",
}


@dataclasses.dataclass(frozen=True)
class ProbeOptions:
  """Options of a probe, apart from its input files.

  Attributes:
    models: names from `models.MODELS`.
    beside: names from `comparisons.COMPARISONS`; None: aggregates if the run of the embeddings is found.
    workdir: the run that made the embeddings, if their manifest does not name it.
    as_of: the times to probe at, in microseconds since 1970 UTC; empty: all.
    protocol: splits, seed and intervals.
    threads: fits that run in parallel, each on one thread (the MLP's on JAX's own threads).
    mlp_size: `(thin, wide)` of the MLP; None: its defaults.
  """

  models: tuple[str, ...] = ("logistic", "lightgbm")
  beside: tuple[str, ...] | None = None
  workdir: pathlib.Path | None = None
  as_of: tuple[int, ...] = ()
  protocol: Protocol = dataclasses.field(default_factory=Protocol)
  threads: int = dataclasses.field(default_factory=models_lib.default_threads)
  mlp_size: tuple[int, int] | None = None


def probe(
  table: LabelTable, judged: UserVectors, others: Sequence[UserVectors], options: ProbeOptions
) -> dict[str, Any]:
  """Probes the vectors `judged` and, on exactly the same users, `others` and the comparisons of `options.beside`.

  Returns: the content of the JSON file; see `protocol.ProbeResult` for its figures.

  Raises:
    DataError: labels and embeddings share no user or time, a comparison cannot be made, or no label can be measured.
    ConfigError: a model is unknown or not installed, a comparison is unknown, or two sets of vectors share a name.
  """
  begun = clock.monotonic()
  chosen = models_lib.make_models(options.models, options.mlp_size)
  user, time, choice = _keys(table, judged, options.as_of)
  if not (judged.find(user, time) >= 0).any():
    raise DataError(_nothing_shared(table, judged, time))
  beside, notes = _comparisons(judged, user, time, options)
  every = {f.name: f for f in (judged, *others, *beside)}
  if len(every) < 1 + len(others) + len(beside):
    raise ConfigError(f"two of {', '.join(f.name for f in (judged, *others, *beside))} have one name; rename one.")
  found = {n: f.find(user, time) for n, f in every.items()}
  counts = _counts(table, judged, user, choice, found)
  usable = np.flatnonzero(np.all([r >= 0 for r in found.values()], axis=0))
  if not len(usable):
    missing = [f"{n} {c:,}" for n, c in counts["label_rows_without"].items() if c]
    raise DataError(
      f"no labelled row of {judged.name} has a row in all vectors compared with it. Labelled rows that lack one: "
      f"{', '.join(missing)}. Compare vectors of the same users and times, or leave out those that share none."
    )
  rows = choice[usable]
  _, number = np.unique(user[usable], return_inverse=True)
  whose = ProbeRows(number, None if time is None else time[usable])
  at = {n: found[n][usable] for n in every}
  not_measured, asked = dict(table.not_measured), {}
  total = len(table.labels) * len(every) * len(chosen) * options.protocol.splits
  with (
    threadpoolctl.threadpool_limits(1),
    ProgressBar(total=total, desc="probing", unit=" fits", mininterval=1) as bar,
  ):
    for label in table.labels:
      bar.set_postfix_str(label.name, refresh=False)
      known = np.flatnonzero(np.isfinite(label.value[rows]))
      own = label._replace(value=label.value[rows][known])
      x = {n: every[n].x[at[n][known]] for n in every}
      then = None if whose.time is None else whose.time[known]
      try:
        if not len(known):
          raise UnmeasurableLabel("no user with this label has an embedding")
        asked[label.name] = protocol_lib.predict_all(
          x, own, ProbeRows(whose.user[known], then), chosen, options.protocol, options.threads, lambda: bar.update(1)
        )
      except UnmeasurableLabel as error:
        not_measured[label.name] = str(error)
        bar.total -= len(every) * len(chosen) * options.protocol.splits
  if not asked:
    raise DataError("nothing can be measured: " + "; ".join(f"{n}: {why}" for n, why in not_measured.items()) + ".")
  groups = _groups(table, asked)
  measured = protocol_lib.measure_predictions(asked, judged.name, options.protocol, groups)
  return {
    "kind": "probe",
    "judged": judged.name,
    "features": {n: f.about for n, f in every.items()},
    "models": {n: models_lib.describe_model(m) for n, m in chosen.items()},
    "protocol": {**dataclasses.asdict(options.protocol), "interval": INTERVALS[options.protocol.temporal]},
    "counts": {**counts, "rows_probed": len(usable), "users_probed": len(np.unique(number))},
    "labels": {n: _of_label(table, a, measured[n], options.protocol) for n, a in asked.items()},
    "means": {n: {"labels": names, **_figures(measured[n])} for n, names in groups.items()},
    "not_measured": not_measured,
    "notes": notes,
    "threads": options.threads,
    "versions": environment.installed(LIBRARIES),
    "seconds": round(clock.monotonic() - begun, 1),
  }


def _keys(
  table: LabelTable, judged: UserVectors, as_of: Sequence[int]
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
  """Returns the user and the time of each label to probe, and its row in the table."""
  everything = np.arange(len(table.users))
  if table.time is not None:
    choice = np.flatnonzero(np.isin(table.time, as_of)) if as_of else everything
    return table.users[choice], table.time[choice], choice
  times = list(as_of) or judged.times
  if len(times) > 1 and not as_of and judged.time is not None and len(set(judged.user)) == len(judged.user):
    own = dict(zip(judged.user, judged.time.tolist()))  # one embedding a user, as of the user's last event
    return table.users, np.array([own.get(u, 0) for u in table.users], np.int64), everything
  if len(times) > 1:
    raise DataError(
      f"the labels have no time, and {judged.name} have the times {', '.join(map(format_time, times))}: name one with "
      "--as-of, or the labels' column of times with --time."
    )
  return table.users, np.full(len(everything), times[0]) if times else None, everything


def _comparisons(
  judged: UserVectors, user: np.ndarray, time: np.ndarray | None, options: ProbeOptions
) -> tuple[list[UserVectors], list[str]]:
  """Returns the vectors of `options.beside`, and notes on missing aggregates and on user labels used in training."""
  wanted = ("aggregates",) if options.beside is None else options.beside
  if not wanted:
    return [], []
  from supermoe_jax.probing import comparisons  # imports JAX, which probing files of other systems does not need

  for name in wanted:
    if name not in comparisons.COMPARISONS:
      raise ConfigError(f"--beside {name} is unknown; valid: {', '.join(comparisons.COMPARISONS)}.")
  try:
    origin = comparisons.find_origin(judged.about, options.workdir)
    if time is None:
      raise DataError("the labels have no time; name it with --as-of.")
  except (DataError, ConfigError) as error:
    if options.beside is None and options.workdir is None:
      return [], [f"not compared with aggregates: {error}"]
    raise DataError(f"--beside {' '.join(wanted)}: {error}") from error
  out = []
  for name in wanted:
    if name == "aggregates":
      out.append(comparisons.aggregate_vectors(origin, user, time))
    else:
      out.append(comparisons.untrained_vectors(origin, time, options.protocol.seed))
  taught = [c for t in origin.cfg.active_tasks.values() if (c := t.user_column or t.dated_column)]
  if taught and "directory" in judged.about:
    columns = ", ".join(dict.fromkeys(taught))
    return out, [
      f"the encoder was trained on labels of users ({columns}): scores on labels that derive from these are too high"
    ]
  return out, []


def _counts(
  table: LabelTable, judged: UserVectors, user: np.ndarray, choice: np.ndarray, found: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Returns how many users and label rows there are, and how many of them lack an embedding or a label."""
  own, labelled = found[judged.name], set(user)
  return {
    "label_rows": len(table.users),
    "label_rows_repeated": table.repeated_rows,
    "label_rows_of_other_times": len(table.users) - len(choice),
    "labelled_users": len(labelled),
    "labelled_users_without_embedding": len(labelled - set(judged.user)),
    "label_rows_without_embedding": int(np.sum(own < 0)),
    "embedded_users": len(set(judged.user)),
    "embedded_users_without_label": len(set(judged.user) - labelled),
    "label_rows_without": {n: int(np.sum((r < 0) & (own >= 0))) for n, r in found.items() if n != judged.name},
  }


def _nothing_shared(table: LabelTable, judged: UserVectors, time: np.ndarray | None) -> str:
  if time is not None and judged.times and not np.isin(time, judged.times).any():
    own = ", ".join(format_time(t) for t in np.unique(time)[:6]) or "no time that --as-of names"
    return (
      f"labels and {judged.name} share no time: the labels have {own}, {judged.name} has "
      f"{', '.join(map(format_time, judged.times[:6]))}."
    )
  return (
    f"labels and {judged.name} share no user: the first are {', '.join(table.users[:3])} and "
    f"{', '.join(judged.user[:3])}; check that --user names the column of users."
  )


def _groups(table: LabelTable, asked: Mapping[str, ProbePredictions]) -> dict[str, list[str]]:
  """Returns the measured columns of each glob, divided by kind of label; leaves out groups of fewer than two."""
  out = {}
  for pattern, names in table.groups.items():
    kinds: dict[tuple[str, int], list[str]] = {}
    for name in names:
      if name in asked:
        label = asked[name].label
        kinds.setdefault((label.kind, label.outputs), []).append(name)
    for (kind, _), members in kinds.items():
      if len(members) > 1:
        text = f"mean({pattern})" if len(kinds) == 1 else f"mean({pattern}, {kind} of {len(members)})"
        out[text] = members
  return out


def _of_label(table: LabelTable, a: ProbePredictions, measured: ProbeResult, protocol: Protocol) -> dict[str, Any]:
  label: Label = a.label
  whole = next(c for c in table.labels if c.name == label.name)
  asked = label.value[a.splits[0].asked] if protocol.temporal else label.value
  out: dict[str, Any] = {
    "kind": label.kind,
    "classes": list(label.classes),
    "missing": int(np.sum(~np.isfinite(whole.value))),
    "probed": len(label.value),
    "asked": len(asked),
  }
  if label.kind == "regression":
    out |= {"mean": float(asked.mean()), "std": float(asked.std())}
  else:
    count = np.bincount(asked.astype(np.int64), minlength=len(label.classes))
    out["asked_of_class"] = dict(zip(label.classes, count.tolist()))
  out |= _figures(measured)
  if not protocol.temporal:
    for (name, model), found in protocol_lib.out_of_fold(a, protocol).items():
      for metric, value in found.items():
        out["scores"][name][model][metric]["out_of_fold"] = value
  return out


def _figures(measured: ProbeResult) -> dict[str, Any]:
  def plain(part: Mapping[str, Mapping[str, protocol_lib.Scores]]) -> dict[str, Any]:
    return {f: {m: {n: i._asdict() for n, i in s.items()} for m, s in ms.items()} for f, ms in part.items()}

  return {
    "main_metric": measured.main,
    "best_model": measured.best,
    "scores": plain(measured.scores),
    "differences": plain(measured.differences),
  }


def read_inputs(
  labels: pathlib.Path,
  named: Mapping[str, pathlib.Path],
  *,
  user: str = "user_id",
  time: str | None = None,
  wanted: Sequence[str] = (),
  kinds: Mapping[str, label_table.LabelKind] | None = None,
  text: config.TextFormat = PLAIN_TEXT,
  time_format: str = "",
  views: Sequence[str] = (),
) -> tuple[LabelTable, list[UserVectors]]:
  """Reads a label table and the `named` embeddings; see `label_table.read_label_table` and `vectors.read_vectors`.

  `views` are those to keep of the first embeddings, which are judged.
  """
  table = label_table.read_label_table(labels, user, time, wanted, kinds, text, time_format)
  judged = next(iter(named))
  return table, [
    vectors.read_vectors(name, path, user, time, views if name == judged else ()) for name, path in named.items()
  ]
