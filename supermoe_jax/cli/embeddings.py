"""Defines the verb that writes user embeddings: embed."""

from __future__ import annotations

import argparse
import pathlib

from supermoe_jax.cli.arguments import Verbs, add_checkpoint, add_processes, add_workdir, open_run

# Phrases for the manifest's counts of users that were not computed.
_SPARED = {"kept": "reused from --since", "done_before": "computed before this command resumed"}


def add_embedding_verbs(verbs: Verbs) -> None:
  """Adds the verb embed."""
  verb = verbs.add_parser("embed", help="write the embeddings of all users as of one or more times")
  add_workdir(verb)
  add_checkpoint(verb)
  verb.add_argument(
    "--as-of",
    nargs="+",
    required=True,
    metavar="TIME",
    help="times such as 2017-11-01 (UTC); 'now', the end of the log; or 'last', just after each user's own last event",
  )
  verb.add_argument("--out", type=pathlib.Path, help="directory to write; default: WORKDIR/embeddings")
  verb.add_argument("--overwrite", action="store_true", help="replace existing embeddings")
  verb.add_argument(
    "--since",
    type=pathlib.Path,
    metavar="DIR",
    help="embeddings of this run from before 'supermoe append', or a run directory that holds them; the command "
    "computes only users with new events before a time and reuses the others",
  )
  verb.add_argument("--columns", nargs="+", default=(), metavar="COLUMN", help="columns of the user table to copy")
  verb.add_argument(
    "--dtype", default="float32", choices=("float32", "float16"), help="number type of the vectors in the files"
  )
  verb.add_argument(
    "--views",
    action="store_true",
    help="write vectors of named views, each normalised: state, the encoder's vector at length 1; answers of "
    "the tasks; and, if the config has them, aggregates, counts of values and factors of fields. Default: the "
    "encoder's vector alone",
  )
  add_processes(verb)
  verb.set_defaults(run=_embed)


def _embed(args: argparse.Namespace) -> None:
  from supermoe_jax.distributed import processes

  processes.initialize(processes.find_place(args.coordinator, args.processes, args.process))
  from supermoe_jax.embeddings import embed, views

  out = args.out or args.workdir / "embeddings"
  options = {"overwrite": args.overwrite, "since": args.since, "columns": args.columns, "dtype": args.dtype}
  options["views"] = args.views
  manifest = embed.embed(open_run(args), args.as_of, out, **options)
  processes.leave()
  if not processes.is_first():
    return
  print(f"{manifest['rows']:,} embeddings of width {manifest['width']} in {manifest['parts']} part(s): {out}")
  if "views" in manifest:
    print(f"  views: {views.views_text(manifest)}")
  for time, count in manifest["as_of"].items():
    late = "; note: the log ends before this time" if count["after_log_end"] else ""
    print(f"  as of {time}: {count['rows']:,} users, {count['users_without_events_before']:,} without events yet{late}")
  users, seconds = manifest["users"], manifest["seconds"]
  spared = "".join(f", {users[key]:,} {words}" for key, words in _SPARED.items() if users[key])
  took = (
    f"{seconds['whole']:,.1f} s: {seconds['encoding']:,.1f} s in the encoder, {seconds['compiling']:,.1f} s compiling"
  )
  print(f"  {users['computed']:,} users computed{spared}, in {took}")
