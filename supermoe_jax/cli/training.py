"""Defines the verbs that make a run and judge it: plan, train, evaluate, seesaw, report."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
from typing import Any

from supermoe_jax import config
from supermoe_jax.cli.arguments import (
  Verbs,
  add_checkpoint,
  add_config,
  add_processes,
  add_workdir,
  check_output_file,
  open_run,
)
from supermoe_jax.errors import ConfigError, ExitCode


def add_training_verbs(verbs: Verbs) -> None:
  """Adds the verbs plan, train, evaluate, seesaw and report."""
  verb = verbs.add_parser("plan", help="compile a training step for a pod and print its memory, traffic and time")
  add_config(verb)
  verb.add_argument(
    "--topology",
    required=True,
    nargs="+",
    metavar="NAME",
    help="v5e:16x16, v5p:4x4x8, v6e:4x4 …; h100:8x8 (nodes x GPUs) and cpu:8 are estimates by XLA:CPU. Name several "
    "with --sweep",
  )
  verb.add_argument("--slices", type=int, default=1, help="number of TPU slices of that topology; default: 1")
  verb.add_argument(
    "--effort",
    type=float,
    default=-1.0,
    metavar="E",
    help="XLA:TPU's effort to make the program fast, from -1 to 1; a run uses 0, which compiles slowly. Default: -1",
  )
  verb.add_argument(
    "--sweep",
    nargs="?",
    const="weak",
    choices=("weak", "strong"),
    help="compare topologies with the config's batch per device (weak, the default) or its whole batch (strong)",
  )
  verb.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the results to this JSON file")
  verb.add_argument("--figure", type=pathlib.Path, metavar="FILE", help="draw the --sweep to this .svg or .png file")
  verb.set_defaults(run=_plan)

  verb = verbs.add_parser("train", help="train a model; the same command resumes the run")
  add_config(verb)
  add_workdir(verb)
  verb.add_argument("--dry-run", action="store_true", help="describe the run and its memory; train and write nothing")
  verb.add_argument("--profile", action="store_true", help="write a trace of a few steps to WORKDIR/profile")
  add_processes(verb)
  verb.set_defaults(run=_train)

  verb = verbs.add_parser("evaluate", help="measure every task on validation and test snapshots")
  add_workdir(verb)
  add_checkpoint(verb)
  verb.set_defaults(run=_evaluate)

  verb = verbs.add_parser(
    "seesaw", help="train single tasks and variants, and measure what each task gains or loses in a shared model"
  )
  add_config(verb)
  verb.add_argument(
    "--workdir", required=True, type=pathlib.Path, help="directory of the study; the study keeps finished runs in it"
  )
  verb.add_argument("--jobs", type=int, default=1, help="number of processes that train in parallel; default: 1")
  verb.add_argument(
    "--only", nargs="+", default=(), metavar="VARIANT", help="names or globs of the variants to run; default: all"
  )
  verb.set_defaults(run=_seesaw)

  verb = verbs.add_parser("report", help="write one HTML page about a run")
  add_workdir(verb)
  verb.set_defaults(run=_report)


def _plan(args: argparse.Namespace) -> None:
  cfg = config.load(args.config, args.overrides)
  if len(args.topology) > 1 and not args.sweep:
    raise ConfigError("several topologies need --sweep; add it, or name one topology.")
  if args.figure and not args.sweep:
    raise ConfigError("--figure draws a sweep; add --sweep.")
  if not -1 <= args.effort <= 1:
    raise ConfigError(f"--effort={args.effort:g} must lie in [-1, 1].")
  for name, file in (("--json", args.json), ("--figure", args.figure)):
    if file is not None:
      check_output_file(file, name)
  os.environ["JAX_PLATFORMS"] = "cpu"  # the plan runs nothing; it leaves this machine's accelerator alone
  from supermoe_jax.plan import chips, plan, render, sweep

  topologies = [chips.topology(name, args.slices) for name in args.topology]
  found: Any
  if args.sweep:
    found = sweep.sweep_topologies(cfg, topologies, args.sweep, args.effort)
    print(*sweep.sweep_table(found), sep="\n")
    if args.figure:
      sweep.draw_sweep(found, args.figure)
  else:
    found = plan.plan_step(cfg, topologies[0], args.effort)
    print(*render.plan_text(found), sep="\n")
  if args.json:
    args.json.write_text(json.dumps(found, indent=1) + "\n")


def _train(args: argparse.Namespace) -> int:
  cfg = config.load(args.config, args.overrides)
  from supermoe_jax.distributed import processes, supervisor

  if args.dry_run:
    from supermoe_jax.plan import dry_run

    print(*dry_run.describe_run(cfg), sep="\n")
    return ExitCode.OK
  if supervisor.watched():
    supervisor.follow()
  place = processes.find_place(args.coordinator, args.processes, args.process)
  if place is not None and not supervisor.watched():
    return supervisor.watch(args.arguments, place, args.workdir)
  from supermoe_jax.evaluation.validation import validation_of
  from supermoe_jax.training import loop

  step = loop.train(cfg, args.workdir, validation=validation_of(cfg), place=place, profile=args.profile)
  if processes.is_first():
    print(f"trained to step {step}: {args.workdir}")
  return ExitCode.OK


def _evaluate(args: argparse.Namespace) -> None:
  from supermoe_jax.evaluation import evaluate, results_table

  run = open_run(args)
  result = evaluate.evaluate(run)
  split = results_table.shown_split(result)
  print(results_table.aligned_table(results_table.results_table(result, split)))
  for sentence in results_table.results_words(result, split):
    print(sentence)
  where = "" if split == "test" else " on validation"
  also = ", also on validation" if split == "test" and result["splits"]["validation"] else ""
  print(f"scores{where} at step {run.step}; all metrics{also}: {args.workdir / 'evaluation.json'}")


def _seesaw(args: argparse.Namespace) -> None:
  if args.jobs < 1:
    raise ConfigError(f"--jobs={args.jobs} must be at least 1.")
  cfg = config.load(args.config, args.overrides)
  from supermoe_jax.evaluation import results_table
  from supermoe_jax.report.seesaw_page import write_study_files
  from supermoe_jax.seesaw import sentences, study

  report = study.study(cfg, args.workdir, jobs=args.jobs, only=args.only, publish=write_study_files)
  print(results_table.aligned_table(sentences.gains_table(report)))
  print(*report["words"], sep="\n")
  print(f"all figures: {args.workdir / 'seesaw.json'}; with pictures: {args.workdir / 'seesaw.html'}")


def _report(args: argparse.Namespace) -> None:
  from supermoe_jax import report

  print(f"report: {report.write_report(args.workdir)}")
