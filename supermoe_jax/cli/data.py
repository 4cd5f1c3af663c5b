"""Defines the verbs that make and check a dataset: inspect, prepare, append, check."""

from __future__ import annotations

import argparse
import pathlib
from typing import TYPE_CHECKING

from supermoe_jax import config
from supermoe_jax.cli.arguments import Verbs, add_config, add_text_format, check_output_file, text_format
from supermoe_jax.errors import ConfigError

if TYPE_CHECKING:
  from supermoe_jax.data.preparation import prepare


def add_data_verbs(verbs: Verbs) -> None:
  """Adds the verbs inspect, prepare, append and check."""
  verb = verbs.add_parser("inspect", help="read event files and propose a config")
  verb.add_argument("files", nargs="+", help="paths, globs or folders of event files")
  verb.add_argument(
    "--format",
    default="auto",
    help="parquet, csv, jsonl, json_object, atomic or sequences; default: chosen by the file's ending",
  )
  verb.add_argument("--out", type=pathlib.Path, help="also save the proposed config here")
  add_text_format(verb, "a text table")
  verb.set_defaults(run=_inspect)

  verb = verbs.add_parser("prepare", help="turn the event log into a dataset directory")
  add_config(verb)
  verb.add_argument("--overwrite", action="store_true", help="prepare again even if a dataset is there")
  verb.add_argument(
    "--memory", metavar="SIZE", help="memory limit of DuckDB, such as 4GB; short for --config.data.memory"
  )
  verb.add_argument("--runner", metavar="NAME", help="prepare on Apache Beam with this runner, such as DirectRunner")
  verb.add_argument(
    "--beam", action="append", default=[], metavar="KEY=VALUE", help="an option of Apache Beam; repeat it for several"
  )
  verb.set_defaults(run=_prepare)

  verb = verbs.add_parser("append", help="add the events of new files to a prepared dataset")
  verb.add_argument("--data", required=True, type=pathlib.Path, help="dataset directory")
  verb.add_argument(
    "files",
    nargs="*",
    metavar="SOURCE=FILE",
    help="new files, as paths, globs or folders. A dataset with one source takes FILE alone. Without files the command "
    "adds all files that match the patterns of the dataset's config and that the dataset does not hold yet",
  )
  verb.add_argument(
    "--keep-vocabularies", action="store_true", help="keep new values out of vocabulary instead of giving them codes"
  )
  verb.add_argument(
    "--memory", metavar="SIZE", default="", help="memory limit of DuckDB, such as 4GB; default: the config's"
  )
  verb.set_defaults(run=_append)

  verb = verbs.add_parser("check", help="derive labels again from the raw files and compare them with a dataset")
  verb.add_argument("--data", required=True, type=pathlib.Path, help="dataset directory")
  verb.add_argument("--sample", type=int, default=200, help="number of users to check; default: 200")
  verb.add_argument("--seed", type=int, default=0, help="random seed of the sample; default: 0")
  verb.set_defaults(run=_check)


def _inspect(args: argparse.Namespace) -> None:
  if args.out is not None:
    check_output_file(args.out, "--out")
  from supermoe_jax.data.inspect import inspect

  found = inspect.inspect(args.files, args.format, text_format(args))
  print(found.render())
  if args.out is not None:
    if not found.config:
      raise ConfigError(f"{args.out} is not written, because no config can be proposed.")
    if args.out.exists():
      raise ConfigError(f"{args.out} exists and is not overwritten; name another --out.")
    args.out.write_text(found.config)
    print(f"saved {args.out}")


def _prepare(args: argparse.Namespace) -> None:
  memory = [f"--config.data.memory={args.memory}"] if args.memory else []
  cfg = config.load(args.config, [*args.overrides, *memory])
  if args.beam and not args.runner:
    raise ConfigError("--beam has no effect without --runner.")
  from supermoe_jax.data.preparation import prepare, summary
  from supermoe_jax.data.reading import paths

  paths.check_paths_of_config(cfg.data, cfg.labelled_tasks, config.config_file(args.config))
  engine: prepare.Engine | None = None
  if args.runner:
    from supermoe_jax.data.beam import pipeline

    engine = pipeline.Beam(args.runner, args.beam)
  print(summary.dataset_summary(prepare.prepare(cfg, overwrite=args.overwrite, engine=engine)))


def _append(args: argparse.Namespace) -> None:
  from supermoe_jax.data.append import append, new_files
  from supermoe_jax.data.preparation import summary

  files = new_files.named_files(args.data, args.files) if args.files else None
  manifest = append.append(args.data, files, keep_vocabularies=args.keep_vocabularies, memory=args.memory)
  print(summary.append_summary(manifest))


def _check(args: argparse.Namespace) -> None:
  from supermoe_jax.data.check import check

  print(check.check_summary(check.check_dataset(args.data, sample=args.sample, seed=args.seed)))
