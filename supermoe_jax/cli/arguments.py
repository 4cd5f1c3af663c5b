"""Defines the arguments that several verbs of the `supermoe` command share."""

from __future__ import annotations

import argparse
import pathlib
from typing import TYPE_CHECKING, Any

from supermoe_jax.config import TextFormat
from supermoe_jax.config.text_settings import check_text_format
from supermoe_jax.errors import ConfigError

if TYPE_CHECKING:
  from supermoe_jax.training.run import Run

# The result of `argparse.ArgumentParser.add_subparsers`; argparse has no public type for it.
Verbs = Any


def add_config(verb: argparse.ArgumentParser) -> None:
  """Adds --config."""
  verb.add_argument(
    "--config", required=True, help="config file with get_config(); override keys with --config.key=value"
  )


def add_workdir(verb: argparse.ArgumentParser) -> None:
  """Adds --workdir."""
  verb.add_argument("--workdir", required=True, type=pathlib.Path, help="run directory")


def add_text_format(verb: argparse.ArgumentParser, what: str) -> None:
  """Adds the options of `config.TextFormat` for the table `what`; see `text_format`."""
  group = verb.add_argument_group(f"how {what} is written", "CSV is understood without these options where it can be")
  group.add_argument("--delimiter", metavar="TEXT", default="", help="what separates values; tab stands for a tab")
  group.add_argument(
    "--header",
    action=argparse.BooleanOptionalAction,
    default=None,
    help="whether the first line names the columns; by default it does, and data there is an error",
  )
  group.add_argument("--columns", nargs="+", metavar="NAME", default=(), help="names of all columns, in order")
  group.add_argument("--decimal", choices=(".", ","), default=".", help="the decimal point of numbers; default: .")
  group.add_argument("--thousands", metavar="TEXT", default="", help="what groups the digits of numbers, such as .")
  group.add_argument(
    "--null-values", nargs="+", metavar="TEXT", default=(), help='texts that mean "no value", such as NULL'
  )


def text_format(args: argparse.Namespace) -> TextFormat:
  """Returns the settings that the options of `add_text_format` give.

  Raises:
    ConfigError: the options can never work together.
  """
  text = TextFormat(
    delimiter={"tab": "\t", "\\t": "\t"}.get(args.delimiter, args.delimiter),
    header="auto" if args.header is None else args.header,
    columns=tuple(args.columns),
    decimal=args.decimal,
    thousands=args.thousands,
    null_values=tuple(args.null_values),
  )
  check_text_format("", text)
  return text


def add_checkpoint(verb: argparse.ArgumentParser) -> None:
  """Adds --checkpoint; see `open_run`."""
  verb.add_argument(
    "--checkpoint",
    metavar="WHICH",
    help="checkpoint to read: newest, best (by validation, see config.train.validate) or a step; default: newest, or "
    "best where config.train.steps is 'auto'",
  )


def add_processes(verb: argparse.ArgumentParser) -> None:
  """Adds --coordinator, --processes and --process; see `processes.find_place`."""
  several = verb.add_argument_group(
    "several processes", "JAX finds these values itself on TPU pods, GKE, JobSet, SLURM and MPI"
  )
  several.add_argument(
    "--coordinator", metavar="HOST:PORT", help="address of the first process, as the others reach it"
  )
  several.add_argument("--processes", type=int, metavar="N", help="number of processes")
  several.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")


def check_output_file(file: pathlib.Path, name: str) -> None:
  """Checks that a file of the argument `name` can be written.

  Raises:
    ConfigError: its directory is missing, or it is a directory itself.
  """
  if not file.parent.is_dir():
    raise ConfigError(f"{file}: there is no directory {file.parent}; make it first.")
  if file.is_dir():
    raise ConfigError(f"{name} {file} is a directory; name a file.")


def open_run(args: argparse.Namespace) -> Run:
  """Opens the run in --workdir at the checkpoint that --checkpoint names.

  Raises:
    ConfigError: --checkpoint is neither newest, best nor a step.
  """
  from supermoe_jax.training.checkpoints import validated
  from supermoe_jax.training.run import NEWEST, Run

  if args.checkpoint == "best":
    return Run(args.workdir, validated.best_checkpoint(args.workdir))
  if args.checkpoint not in (None, NEWEST) and not args.checkpoint.isdigit():
    raise ConfigError(f"--checkpoint={args.checkpoint} must be newest, best or a step.")
  return Run(args.workdir, int(args.checkpoint) if args.checkpoint not in (None, NEWEST) else args.checkpoint)
