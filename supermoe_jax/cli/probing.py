"""Defines the verb that measures how well user embeddings predict labels: probe."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

from supermoe_jax import config
from supermoe_jax.cli.arguments import Verbs, add_text_format, text_format
from supermoe_jax.errors import ConfigError, ExitCode


def add_probing_verbs(verbs: Verbs) -> None:
  """Adds the verb probe."""
  verb = verbs.add_parser(
    "probe",
    help="measure how well embeddings predict labels, and compare them with hand-made aggregates, an untrained encoder "
    "or other systems",
    description="Fits probes on frozen embeddings and measures how well they predict the labels of a table. Each score "
    "has a 95 % interval, and so has each paired difference to the compared vectors.",
  )
  verb.add_argument(
    "--embeddings",
    type=pathlib.Path,
    metavar="PATH",
    help="directory that 'supermoe embed' wrote, or a file as for --other",
  )
  verb.add_argument(
    "--other",
    action="append",
    default=[],
    metavar="NAME=PATH",
    help="embeddings of another system or run to compare with: an embedding directory, or a Parquet or CSV file with a "
    "column of users and either one column of lists or columns of numbers. How a CSV file is written is guessed, "
    "and said. Repeat it for several. Without --embeddings the others are compared with the first",
  )
  verb.add_argument(
    "--views",
    nargs="+",
    default=(),
    metavar="VIEW",
    help="views of --embeddings to probe, such as state aggregates, if 'supermoe embed --views' wrote them; default: "
    "all. To compare views with all numbers, name the same directory with --other",
  )
  verb.add_argument("--labels", required=True, type=pathlib.Path, help="label table: Parquet, CSV, JSON lines")
  verb.add_argument(
    "--label",
    nargs="+",
    default=(),
    metavar="COLUMN",
    help="columns of labels; a glob also gives the mean over its columns",
  )
  verb.add_argument("--user", default="user_id", metavar="COLUMN", help="column of users; default: user_id")
  verb.add_argument("--time", metavar="COLUMN", help="column of times; each label then belongs to a user and a time")
  verb.add_argument("--as-of", nargs="+", default=(), metavar="TIME", help="times to probe at; default: all")
  verb.add_argument(
    "--kind",
    action="append",
    default=[],
    metavar="COLUMN=KIND",
    help="kind of a label: binary, multiclass or regression; default: guessed from its values",
  )
  verb.add_argument(
    "--models",
    nargs="+",
    default=("logistic", "lightgbm"),
    metavar="MODEL",
    help="probes to fit: logistic, lightgbm, mlp; default: logistic lightgbm",
  )
  verb.add_argument(
    "--mlp-size", nargs=2, type=int, metavar=("THIN", "WIDE"), help="widths of the MLP; default: 128 256"
  )
  verb.add_argument(
    "--beside",
    nargs="+",
    metavar="WHAT",
    help="vectors to compare with: aggregates, untrained or none; default: aggregates if the embeddings' run is found",
  )
  verb.add_argument("--workdir", type=pathlib.Path, help="run of the embeddings; default: the run in their manifest")
  verb.add_argument("--temporal", action="store_true", help="fit on earlier times and score the last; needs --time")
  verb.add_argument("--folds", type=int, default=5, help="number of folds; default: 5")
  verb.add_argument("--repeats", type=int, default=3, help="number of repeats of the folds; default: 3")
  verb.add_argument(
    "--resamples", type=int, default=1000, help="number of resamples of users, with --temporal; default: 1000"
  )
  verb.add_argument("--seed", type=int, default=0, help="random seed of folds, models and resamples; default: 0")
  verb.add_argument("--threads", type=int, help="number of parallel fits; default: the number of cores, at most 8")
  verb.add_argument(
    "--require",
    action="append",
    default=[],
    metavar="WHAT",
    help="a condition such as 'auc>=0.8', 'churn.auc>=0.8', 'auc>=aggregates', 'mean(cat_*).auc>=0.8'; the exit code "
    "is 1 if it fails. Repeat it for several. With several models the best one counts",
  )
  verb.add_argument(
    "--out",
    type=pathlib.Path,
    metavar="FILE",
    help="JSON file to write; default: PATH.probe.json, next to the embeddings",
  )
  verb.add_argument("--time-format", metavar="FORMAT", default="", help="strptime format of --time; default: ISO 8601")
  add_text_format(verb, "the label table")
  verb.set_defaults(run=_probe)


def _probe(args: argparse.Namespace) -> int:
  from supermoe_jax.probing import requirements

  try:
    named = _named(args)
    required = [requirements.parse_requirement(text) for text in args.require]
    kinds = _kinds(args.kind)
    _check_numbers(args)
  except ValueError as error:
    return _usage(str(error))
  from supermoe_jax import atomic_files
  from supermoe_jax.evaluation import results_table
  from supermoe_jax.probing import models, probe, probe_tables, protocol

  out = _out(args.out, next(iter(named.values())))
  options = probe.ProbeOptions(
    models=tuple(dict.fromkeys(args.models)),
    beside=None if args.beside is None else () if args.beside == ["none"] else tuple(dict.fromkeys(args.beside)),
    workdir=args.workdir,
    as_of=tuple(config.parse_time(t, "--as-of") for t in args.as_of),
    protocol=protocol.Protocol(args.folds, args.repeats, args.temporal, args.seed, args.resamples),
    threads=args.threads or models.default_threads(),
    mlp_size=None if args.mlp_size is None else tuple(args.mlp_size),
  )
  table, (judged, *others) = probe.read_inputs(
    args.labels,
    named,
    user=args.user,
    time=args.time,
    wanted=args.label,
    kinds=kinds,
    text=text_format(args),
    time_format=args.time_format,
    views=args.views,
  )
  beside = [o.name for o in others] + list(("aggregates",) if options.beside is None else options.beside)
  means = [f"mean({pattern})" for pattern in table.groups]
  try:
    requirements.check_names(required, beside, [*(x.name for x in table.labels), *table.not_measured, *means])
  except ValueError as error:
    return _usage(str(error))
  result = probe.probe(table, judged, others, options)
  result["requirements"] = requirements.judge_requirements(required, result)
  atomic_files.write_file(
    out, json.dumps({"labels_file": str(args.labels), **result}, indent=1, ensure_ascii=False) + "\n"
  )
  print(results_table.aligned_table(probe_tables.probe_table(result)))
  print(*probe_tables.probe_notes(result), sep="\n")
  print(f"all figures: {out}")
  for r in result["requirements"]:
    if not r["met"]:
      more = f" and {len(r['failed']) - 3} more" if len(r["failed"]) > 3 else ""
      print(f"supermoe probe: required {r['text']}, but {'; '.join(r['failed'][:3])}{more}", file=sys.stderr)
  return ExitCode.OK if all(r["met"] for r in result["requirements"]) else ExitCode.ERROR


def _usage(message: str) -> int:
  print(f"supermoe probe: {message}; see 'supermoe probe --help'", file=sys.stderr)
  return ExitCode.USAGE


def _named(args: argparse.Namespace) -> dict[str, pathlib.Path]:
  """Returns the embeddings to compare, as paths by name; the first is judged."""
  named = {} if args.embeddings is None else {"embeddings": args.embeddings}
  for text in args.other:
    name, sign, path = text.partition("=")
    if not (name and sign and path):
      raise ValueError(f"--other {text!r} must be NAME=PATH")
    if name in named or name in ("aggregates", "untrained", "best"):
      raise ValueError(f"--other {text!r}: the name {name!r} is taken; choose another")
    named[name] = pathlib.Path(path)
  if not named:
    raise ValueError("name the embeddings to probe, with --embeddings PATH or --other NAME=PATH")
  return named


def _kinds(texts: list[str]) -> dict[str, Any]:
  out: dict[str, Any] = {}
  for text in texts:
    column, _, kind = text.rpartition("=")
    if not column or kind not in ("binary", "multiclass", "regression"):
      raise ValueError(f"--kind {text!r} must be COLUMN=binary, COLUMN=multiclass or COLUMN=regression")
    out[column] = kind
  return out


def _check_numbers(args: argparse.Namespace) -> None:
  least = {"folds": 2, "repeats": 1, "resamples": 100, "seed": 0, "threads": 1}
  for name, lowest in least.items():
    value = getattr(args, name)
    if value is not None and value < lowest:
      raise ValueError(f"--{name} {value} must be at least {lowest}")
  if args.mlp_size is not None and min(args.mlp_size) < 1:
    raise ValueError("--mlp-size takes two widths of at least 1")
  if args.temporal and not args.time:
    raise ValueError("--temporal needs --time, the labels' column of times")
  if args.beside and "none" in args.beside and len(args.beside) > 1:
    raise ValueError("--beside none takes no other value")


def _out(out: pathlib.Path | None, judged: pathlib.Path) -> pathlib.Path:
  """Returns the file for the results: by default next to the judged embeddings.

  It never lies inside an embedding directory, since such a directory is replaced as a whole.
  """
  if out is None:
    whole = judged.absolute()
    return judged.with_name(whole.name + ".probe.json")
  if not out.absolute().parent.is_dir():
    raise ConfigError(f"--out {out}: there is no directory {out.parent}; make it first.")
  if out.is_dir():
    raise ConfigError(f"--out {out} is a directory; name a file.")
  if (out.absolute().parent / "manifest.json").is_file():
    raise ConfigError(f"--out {out} lies in a directory that is replaced as a whole; name a file outside it.")
  return out
