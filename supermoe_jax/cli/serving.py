"""The verbs of an encoder in use: export, serve."""

from __future__ import annotations

import argparse
import pathlib

from supermoe_jax.cli.arguments import Verbs, add_checkpoint, add_workdir, open_run


def add(verbs: Verbs) -> None:
  """Adds the verbs."""
  verb = verbs.add_parser("export", help="write the encoder with its preprocessing, for use with JAX and NumPy alone")
  add_workdir(verb)
  add_checkpoint(verb)
  verb.add_argument("--out", type=pathlib.Path, help="directory to write; default: WORKDIR/encoder")
  verb.add_argument(
    "--batch-sizes", type=int, nargs="+", metavar="B", help="rows of the programs; default: 1 8 64", default=()
  )
  verb.add_argument(
    "--lengths",
    type=int,
    nargs="+",
    metavar="L",
    default=(),
    help="events of the programs, besides model.max_events; default: powers of two from 32",
  )
  verb.add_argument("--overwrite", action="store_true", help="replace an encoder that is there")
  verb.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
  from supermoe_jax.serving import export

  out = args.out or args.workdir / "encoder"
  sizes = tuple(args.batch_sizes) or export.BATCH_SIZES
  manifest = export.export(open_run(args), out, batch_sizes=sizes, events=tuple(args.lengths), overwrite=args.overwrite)
  programs = len(manifest["programs"])
  print(f"encoder of step {manifest['step']}, width {manifest['width']}, for {', '.join(manifest['platforms'])}: {out}")
  print(f"  {programs} programs: batches of {_listed(manifest['batch_sizes'])} × {_listed(manifest['lengths'])} events")


def _listed(numbers: list[int]) -> str:
  return ", ".join(map(str, numbers))
