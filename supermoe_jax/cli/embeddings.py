"""The verbs of user embeddings: embed."""

from __future__ import annotations

import argparse
import pathlib

from supermoe_jax.cli.arguments import Verbs, add_checkpoint, add_workdir, open_run


def add(verbs: Verbs) -> None:
  """Adds the verbs."""
  verb = verbs.add_parser("embed", help="write the embeddings of all users as of one or more times")
  add_workdir(verb)
  add_checkpoint(verb)
  verb.add_argument("--as-of", nargs="+", required=True, metavar="TIME", help="times such as 2017-11-01; UTC")
  verb.add_argument("--out", type=pathlib.Path, help="directory to write; default: WORKDIR/embeddings")
  verb.add_argument("--overwrite", action="store_true", help="replace embeddings that are there")
  verb.set_defaults(run=_embed)


def _embed(args: argparse.Namespace) -> None:
  from supermoe_jax.serving import embed

  out = args.out or args.workdir / "embeddings"
  manifest = embed.embed(open_run(args), args.as_of, out, overwrite=args.overwrite)
  print(f"{manifest['rows']:,} embeddings of width {manifest['width']} in {manifest['parts']} part(s): {out}")
  for time, count in manifest["as_of"].items():
    late = "; note: the log ends before this time" if count["after_log_end"] else ""
    print(f"  as of {time}: {count['rows']:,} users, {count['users_without_events_before']:,} without events yet{late}")
