"""Defines the verbs that search embeddings for users, and align versions of embeddings: neighbors, audience, align."""

from __future__ import annotations

import argparse
import pathlib

from supermoe_jax.cli.arguments import Verbs, add_text_format, check_output_file, text_format
from supermoe_jax.errors import ConfigError


def add_search_verbs(verbs: Verbs) -> None:
  """Adds the verbs neighbors, audience and align."""
  verb = verbs.add_parser("neighbors", help="find the users nearest to given users, or to every user")
  _add_embeddings(verb)
  who = verb.add_mutually_exclusive_group(required=True)
  who.add_argument("--user", action="append", metavar="ID", help="a user; repeat it for several")
  who.add_argument("--all", action="store_true", help="find the neighbours of every user and write them to --out")
  verb.add_argument("--k", type=int, default=10, help="number of neighbours of a user; default: 10")
  verb.add_argument("--metric", default="cosine", help="measure of nearness: cosine, dot or euclidean; default: cosine")
  how = verb.add_mutually_exclusive_group()
  how.add_argument("--exact", action="store_true", help="score every user; the default")
  how.add_argument(
    "--index",
    type=pathlib.Path,
    metavar="FILE",
    help="an index for millions of users; the command builds it if the file is missing",
  )
  verb.add_argument("--recall", type=float, metavar="R", help="recall@10 that a new index must reach; default: 0.98")
  verb.add_argument("--rebuild", action="store_true", help="build the index again even if the file exists")
  verb.add_argument(
    "--out", type=pathlib.Path, metavar="FILE", help="Parquet file to write: user_id, rank, neighbor_id, score"
  )
  verb.set_defaults(run=_neighbors)

  verb = verbs.add_parser("audience", help="find the users most like a list of seeds")
  _add_embeddings(verb)
  verb.add_argument(
    "--seeds",
    required=True,
    type=pathlib.Path,
    metavar="FILE",
    help="seeds: .parquet, .csv or .jsonl with a column user_id, or .txt with one id per line",
  )
  verb.add_argument(
    "--size", required=True, type=int, metavar="N", help="number of users in the audience, without the seeds"
  )
  verb.add_argument(
    "--out", required=True, type=pathlib.Path, metavar="FILE", help="Parquet file to write: user_id, score, rank"
  )
  verb.add_argument("--method", default="logistic", help="how to score users: logistic or centroid; default: logistic")
  add_text_format(verb, "the file of seeds")
  verb.set_defaults(run=_audience)

  verb = verbs.add_parser("align", help="turn the embeddings of a retrained model into the space of earlier ones")
  verb.add_argument(
    "--embeddings", required=True, type=pathlib.Path, metavar="NEW", help="directory of the new embeddings"
  )
  verb.add_argument("--to", required=True, type=pathlib.Path, metavar="OLD", help="directory of the earlier embeddings")
  verb.add_argument("--out", required=True, type=pathlib.Path, metavar="DIR", help="directory to write")
  verb.add_argument(
    "--max-drift",
    type=float,
    default=0.5,
    metavar="X",
    help="largest drift at which the command writes: 1 − mean cosine around the mean, after alignment; default: 0.5",
  )
  verb.add_argument("--overwrite", action="store_true", help="replace existing embeddings")
  verb.set_defaults(run=_align)


def _add_embeddings(verb: argparse.ArgumentParser) -> None:
  verb.add_argument("--embeddings", required=True, type=pathlib.Path, metavar="DIR", help="directory of embeddings")
  verb.add_argument("--as-of", metavar="TIME", help="time of the embeddings to search; default: each user's latest")


def _neighbors(args: argparse.Namespace) -> None:
  if args.k < 1:
    raise ConfigError(f"--k={args.k} must be at least 1.")
  if args.index is None and (args.rebuild or args.recall is not None):
    raise ConfigError("--rebuild and --recall have no effect without --index.")
  if args.all and args.out is None:
    raise ConfigError("--all writes the neighbours of every user; name a Parquet file with --out.")
  if args.out is not None:
    check_output_file(args.out, "--out")
  from supermoe_jax.embeddings import neighbors

  search = neighbors.open_search(
    args.embeddings,
    metric=args.metric,
    as_of=args.as_of,
    index=args.index,
    recall=0.98 if args.recall is None else args.recall,
    rebuild=args.rebuild,
  )
  print(*search.said, sep="\n")
  if args.all:
    rows = neighbors.write_all_neighbors(search, args.k, args.out)
    print(f"{rows:,} rows: {args.out}")
    return
  table = search.of(args.user, args.k)
  print(*neighbors.neighbors_text(table, args.metric), sep="\n")
  if args.out is not None:
    neighbors.write_neighbors(table, args.out)
    print(f"{len(table):,} rows: {args.out}")


def _audience(args: argparse.Namespace) -> None:
  if args.header is False and not args.columns:
    args.columns = ["user_id"]
  text = text_format(args)
  from supermoe_jax.embeddings import audience

  report = audience.audience(
    args.embeddings, args.seeds, args.size, args.out, method=args.method, as_of=args.as_of, text=text
  )
  print(*audience.audience_summary(report), sep="\n")
  print(f"{report['size']:,} users: {args.out}")


def _align(args: argparse.Namespace) -> None:
  from supermoe_jax.embeddings import align

  manifest = align.align_embeddings(
    args.embeddings, args.to, args.out, max_drift=args.max_drift, overwrite=args.overwrite
  )
  print(*align.alignment_summary(manifest), sep="\n")
  print(f"{manifest['rows']:,} embeddings of width {manifest['width']}, in the space of {args.to}: {args.out}")
