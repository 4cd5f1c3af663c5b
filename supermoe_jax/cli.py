"""The verbs of the `supermoe` command."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from supermoe_jax import config, exits

if TYPE_CHECKING:
  from supermoe_jax.training.run import Run

# Errors that a user can act on: their message is enough, a stack trace would only hide it.
_EXPECTED = {"ConfigError", "DataError", "RunError", "StudyError"}


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a verb.

  Returns: an exit code, see `exits`.
  """
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  code = _main(arguments)
  if code and _watched():
    # Of several processes one that fails does not wait, at its exit, for others that are gone or hang.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return code


def _main(arguments: Sequence[str]) -> int:
  args, rest = _parser().parse_known_args(arguments)
  args.arguments = arguments
  args.overrides = [a for a in rest if a.startswith("--config.")]
  unknown = [a for a in rest if not a.startswith("--config.")]
  if unknown:
    print(f"supermoe {args.verb}: unknown argument {unknown[0]!r}; see 'supermoe {args.verb} --help'", file=sys.stderr)
    return exits.USAGE
  if args.overrides and not hasattr(args, "config"):
    print(
      f"supermoe {args.verb}: {args.overrides[0]!r} has no effect here: a run keeps the config it was trained with",
      file=sys.stderr,
    )
    return exits.USAGE
  try:
    return args.run(args) or exits.OK
  except KeyboardInterrupt:
    print(f"supermoe {args.verb}: interrupted", file=sys.stderr)
    return exits.INTERRUPTED
  except BaseException as error:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    explained = bool(kinds & {"Stopped", *_EXPECTED})
    if not explained and _watched() and isinstance(error, Exception):
      traceback.print_exc()
      return exits.CRASHED
    if not explained or os.environ.get("SUPERMOE_TRACEBACK"):
      raise
    print(f"supermoe {args.verb}: {error}", file=sys.stderr)
    return exits.RESUME if "Stopped" in kinds else exits.ERROR


def _watched() -> bool:
  """Whether another process watches over this one; see `training.lookout`."""
  return "SUPERMOE_LOOKOUT" in os.environ


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="supermoe",
    description="Learns universal user representations from an event log.",
    epilog="Any key of the config can be set with --config.key=value, for example --config.train.steps=100.",
  )
  verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")

  verb = verbs.add_parser("inspect", help="read event files and propose a config")
  verb.add_argument("files", nargs="+", help="paths or globs of event files")
  verb.add_argument(
    "--format",
    default="auto",
    help="parquet, csv, jsonl, json_object, atomic or sequences; default: by the file's ending",
  )
  verb.add_argument("--out", type=pathlib.Path, help="also save the proposed config here")
  verb.set_defaults(run=_inspect)

  verb = verbs.add_parser("prepare", help="turn the event log into a dataset directory")
  _add_config(verb)
  verb.add_argument("--overwrite", action="store_true", help="prepare again even if a dataset is there")
  verb.add_argument("--memory", metavar="SIZE", help="DuckDB's budget, such as 4GB; short for --config.data.memory")
  verb.add_argument("--runner", metavar="NAME", help="prepare on Apache Beam with this runner, such as DirectRunner")
  verb.add_argument(
    "--beam", action="append", default=[], metavar="KEY=VALUE", help="an option of Beam's; may be given several times"
  )
  verb.set_defaults(run=_prepare)

  verb = verbs.add_parser("append", help="add the events of new files to a prepared dataset")
  verb.add_argument("--data", required=True, type=pathlib.Path, help="dataset directory")
  verb.add_argument(
    "files",
    nargs="*",
    metavar="SOURCE=FILE",
    help="new files, paths or globs; of a dataset with one source FILE alone; none: the files that the patterns of its "
    "config match by now and that it does not hold yet",
  )
  verb.add_argument("--keep-vocabularies", action="store_true", help="give no new value a code of its own")
  verb.add_argument("--memory", metavar="SIZE", default="", help="DuckDB's budget, such as 4GB; default: the config's")
  verb.set_defaults(run=_append)

  verb = verbs.add_parser("check", help="derive labels of a prepared dataset again, straight from the raw files")
  verb.add_argument("--data", required=True, type=pathlib.Path, help="dataset directory")
  verb.add_argument("--sample", type=int, default=200, help="users to check; default: 200")
  verb.add_argument("--seed", type=int, default=0, help="of the sample; default: 0")
  verb.set_defaults(run=_check)

  verb = verbs.add_parser(
    "plan", help="what a training step takes on a pod: memory, traffic, time; compiled, not guessed"
  )
  _add_config(verb)
  verb.add_argument(
    "--topology",
    required=True,
    nargs="+",
    metavar="NAME",
    help="v5e:16x16, v5p:4x4x8, v6e:4x4 …; h100:8x8 (nodes x GPUs) and cpu:8 by arithmetic and XLA:CPU. Several with "
    "--sweep",
  )
  verb.add_argument("--slices", type=int, default=1, help="TPU slices of that topology; default: 1")
  verb.add_argument(
    "--effort",
    type=float,
    default=-1.0,
    metavar="E",
    help="XLA:TPU's, from -1 to 1, to make the program quick; a run has 0, which takes long. Default: -1",
  )
  verb.add_argument(
    "--sweep",
    nargs="?",
    const="weak",
    choices=("weak", "strong"),
    help="compare topologies, with the config's batch a device on each (weak, the default) or its whole batch (strong)",
  )
  verb.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything there too")
  verb.add_argument("--figure", type=pathlib.Path, metavar="FILE", help="--sweep: draw it, as .svg or .png")
  verb.set_defaults(run=_plan)

  verb = verbs.add_parser("train", help="train; the same command again resumes")
  _add_config(verb)
  _add_workdir(verb)
  verb.add_argument("--dry-run", action="store_true", help="say what the run would be, its memory included; do nothing")
  verb.add_argument("--profile", action="store_true", help="write a trace of a few steps to WORKDIR/profile")
  several = verb.add_argument_group("several processes", "found by themselves on TPU pods, GKE, JobSet, SLURM and MPI")
  several.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process, as the others reach it")
  several.add_argument("--processes", type=int, metavar="N", help="how many there are")
  several.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
  verb.set_defaults(run=_train)

  verb = verbs.add_parser("evaluate", help="metrics of every task on validation and test snapshots")
  _add_workdir(verb)
  _add_checkpoint(verb)
  verb.set_defaults(run=_evaluate)

  verb = verbs.add_parser("embed", help="write the embeddings of all users as of one or more times")
  _add_workdir(verb)
  _add_checkpoint(verb)
  verb.add_argument("--as-of", nargs="+", required=True, metavar="TIME", help="times such as 2017-11-01; UTC")
  verb.add_argument("--out", type=pathlib.Path, help="directory to write; default: WORKDIR/embeddings")
  verb.add_argument("--overwrite", action="store_true", help="replace embeddings that are there")
  verb.set_defaults(run=_embed)

  verb = verbs.add_parser("seesaw", help="what each task gains or loses beside the others: single tasks and variants")
  _add_config(verb)
  verb.add_argument("--workdir", required=True, type=pathlib.Path, help="directory of the study; runs in it are kept")
  verb.add_argument("--jobs", type=int, default=1, help="processes that train side by side; default: 1")
  verb.add_argument("--only", nargs="+", default=(), metavar="VARIANT", help="names or globs of the variants to run")
  verb.set_defaults(run=_seesaw)

  verb = verbs.add_parser("report", help="write one HTML page about a run")
  _add_workdir(verb)
  verb.set_defaults(run=_report)
  return parser


def _add_config(verb: argparse.ArgumentParser) -> None:
  verb.add_argument(
    "--config", required=True, help="config file with get_config(); override keys with --config.key=value"
  )


def _add_workdir(verb: argparse.ArgumentParser) -> None:
  verb.add_argument("--workdir", required=True, type=pathlib.Path, help="run directory")


def _add_checkpoint(verb: argparse.ArgumentParser) -> None:
  verb.add_argument(
    "--checkpoint",
    default="newest",
    metavar="WHICH",
    help="newest; best, of those that were validated (config.train.validate); or a step. Default: newest",
  )


# The verbs import what they need when they run: 'supermoe --help' should not wait for JAX.


def _inspect(args: argparse.Namespace) -> None:
  from supermoe_jax.data import inspection

  found = inspection.inspect(args.files, args.format)
  print(found.render())
  if args.out is not None:
    if not found.config:
      raise config.ConfigError(f"no config can be proposed, so {args.out} is not written.")
    if args.out.exists():
      raise config.ConfigError(f"{args.out} exists and is not overwritten; name another --out.")
    args.out.write_text(found.config)
    print(f"saved {args.out}")


def _prepare(args: argparse.Namespace) -> None:
  memory = [f"--config.data.memory={args.memory}"] if args.memory else []
  cfg = config.load(args.config, [*args.overrides, *memory])
  if args.beam and not args.runner:
    raise config.ConfigError("--beam has no effect without --runner.")
  from supermoe_jax.data import prepare, summary

  engine: prepare.Engine | None = None
  if args.runner:
    from supermoe_jax.data import beam

    engine = beam.Beam(args.runner, args.beam)
  print(summary.render(prepare.prepare(cfg, overwrite=args.overwrite, engine=engine)))


def _append(args: argparse.Namespace) -> None:
  from supermoe_jax.data import append, new_files, summary

  files = new_files.named_files(args.data, args.files) if args.files else None
  manifest = append.append(args.data, files, keep_vocabularies=args.keep_vocabularies, memory=args.memory)
  print(summary.render_append(manifest))


def _check(args: argparse.Namespace) -> None:
  from supermoe_jax.data import check

  print(check.render(check.check(args.data, sample=args.sample, seed=args.seed)))


def _plan(args: argparse.Namespace) -> None:
  cfg = config.load(args.config, args.overrides)
  if len(args.topology) > 1 and not args.sweep:
    raise config.ConfigError("several topologies are compared with --sweep; without it name one.")
  if args.figure and not args.sweep:
    raise config.ConfigError("--figure draws a --sweep.")
  if not -1 <= args.effort <= 1:
    raise config.ConfigError(f"--effort={args.effort:g} must lie in [-1, 1].")
  for file in filter(None, (args.json, args.figure)):
    if not file.parent.is_dir():
      raise config.ConfigError(f"{file}: there is no directory {file.parent}; make it first.")
  os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs; an accelerator that is here is left alone
  from supermoe_jax.plan import chips, plan, render, sweep

  topologies = [chips.topology(name, args.slices) for name in args.topology]
  found: Any
  if args.sweep:
    found = sweep.sweep(cfg, topologies, args.sweep, args.effort)
    print(*sweep.lines(found), sep="\n")
    if args.figure:
      sweep.draw(found, args.figure)
  else:
    found = plan.plan(cfg, topologies[0], args.effort)
    print(*render.lines(found), sep="\n")
  if args.json:
    args.json.write_text(json.dumps(found, indent=1) + "\n")


def _train(args: argparse.Namespace) -> int:
  cfg = config.load(args.config, args.overrides)
  from supermoe_jax import hosts
  from supermoe_jax.training import lookout

  if args.dry_run:
    from supermoe_jax.plan import dry_run

    print(*dry_run.describe(cfg), sep="\n")
    return exits.OK
  if lookout.watched():
    lookout.follow()
  place = hosts.find(args.coordinator, args.processes, args.process)
  if place is not None and not lookout.watched():
    return lookout.watch(args.arguments, place, args.workdir)
  from supermoe_jax.training import loop

  step = loop.train(cfg, args.workdir, place=place, profile=args.profile)
  if hosts.first():
    print(f"trained to step {step}: {args.workdir}")
  return exits.OK


def _open(args: argparse.Namespace) -> Run:
  """The run directory, at the checkpoint that was asked for."""
  from supermoe_jax.evaluation import validation
  from supermoe_jax.training.run import Run

  if args.checkpoint == "best":
    return Run(args.workdir, validation.best_checkpoint(args.workdir))
  if args.checkpoint != "newest" and not args.checkpoint.isdigit():
    raise config.ConfigError(f"--checkpoint={args.checkpoint} must be newest, best or a step.")
  return Run(args.workdir, None if args.checkpoint == "newest" else int(args.checkpoint))


def _evaluate(args: argparse.Namespace) -> None:
  from supermoe_jax.evaluation import evaluate

  run = _open(args)
  result = evaluate.evaluate(run)
  print(evaluate.render(evaluate.table(result)))
  print(f"of step {run.step}; all metrics, validation too: {args.workdir / 'evaluation.json'}")


def _embed(args: argparse.Namespace) -> None:
  from supermoe_jax.serving import embed

  out = args.out or args.workdir / "embeddings"
  manifest = embed.embed(_open(args), args.as_of, out, overwrite=args.overwrite)
  print(f"{manifest['rows']:,} embeddings of width {manifest['width']} in {manifest['parts']} part(s): {out}")
  for time, count in manifest["as_of"].items():
    late = "; note: the log ends before this time" if count["after_log_end"] else ""
    print(f"  as of {time}: {count['rows']:,} users, {count['users_without_events_before']:,} without events yet{late}")


def _seesaw(args: argparse.Namespace) -> None:
  if args.jobs < 1:
    raise config.ConfigError(f"--jobs={args.jobs} must be at least 1.")
  cfg = config.load(args.config, args.overrides)
  from supermoe_jax.evaluation import evaluate, seesaw_words, study

  report = study.study(cfg, args.workdir, jobs=args.jobs, only=args.only)
  print(evaluate.render(seesaw_words.table(report)))
  print(*report["words"], sep="\n")
  print(f"all figures: {args.workdir / 'seesaw.json'}; with pictures: {args.workdir / 'seesaw.html'}")


def _report(args: argparse.Namespace) -> None:
  from supermoe_jax import report

  print(f"report: {report.write(args.workdir)}")
