"""Defines the verbs that export an encoder and serve it over HTTP: export, serve."""

from __future__ import annotations

import argparse
import pathlib

from supermoe_jax.cli.arguments import Verbs, add_checkpoint, add_workdir, open_run
from supermoe_jax.errors import ConfigError


def add_serving_verbs(verbs: Verbs) -> None:
  """Adds the verbs export and serve."""
  verb = verbs.add_parser("export", help="write the encoder with its preprocessing, for JAX and NumPy alone")
  add_workdir(verb)
  add_checkpoint(verb)
  verb.add_argument("--out", type=pathlib.Path, help="directory to write; default: WORKDIR/encoder")
  verb.add_argument(
    "--batch-sizes", type=int, nargs="+", metavar="B", help="batch sizes of the programs; default: 1 8 64", default=()
  )
  verb.add_argument(
    "--lengths",
    type=int,
    nargs="+",
    metavar="L",
    default=(),
    help="history lengths of the programs, in addition to model.max_events; default: powers of two from 32",
  )
  verb.add_argument("--overwrite", action="store_true", help="replace an existing encoder")
  verb.set_defaults(run=_export)
  verb = verbs.add_parser("serve", help="answer HTTP requests for embeddings with an exported encoder")
  verb.add_argument("--model", type=pathlib.Path, required=True, help="directory that 'supermoe export' wrote")
  verb.add_argument("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1")
  verb.add_argument("--port", type=int, default=8000, help="port to listen on; default: 8000")
  verb.add_argument(
    "--wait-ms",
    type=float,
    default=4.0,
    help="longest wait of a user for others to share a batch, in milliseconds; default: 4",
  )
  verb.add_argument("--most-users", type=int, default=64, help="most users of one request; default: 64")
  verb.add_argument("--most-events", type=int, default=10_000, help="most events of one user; default: 10000")
  verb.add_argument(
    "--most-bytes", type=int, default=8 * 2**20, help="most bytes of one request's body; default: 8 MiB"
  )
  verb.add_argument(
    "--most-waiting",
    type=int,
    default=512,
    help="most users that wait; the service answers further requests with 429; default: 512",
  )
  verb.set_defaults(run=_serve)


def _export(args: argparse.Namespace) -> None:
  from supermoe_jax.serving import export

  out = args.out or args.workdir / "encoder"
  sizes = tuple(args.batch_sizes) or export.BATCH_SIZES
  manifest = export.export_encoder(
    open_run(args), out, batch_sizes=sizes, events=tuple(args.lengths), overwrite=args.overwrite
  )
  programs = len(manifest["programs"])
  print(f"encoder of step {manifest['step']}, width {manifest['width']}, for {', '.join(manifest['platforms'])}: {out}")
  print(f"  {programs} programs: batches of {_listed(manifest['batch_sizes'])} × {_listed(manifest['lengths'])} events")


def _serve(args: argparse.Namespace) -> None:
  try:
    import uvicorn

    from supermoe_jax.serving import requests, service
  except ModuleNotFoundError as error:
    raise ConfigError(f"{error}; the service needs: pip install 'supermoe_jax[serve]'") from None
  from supermoe_jax.progress import ProgressBar
  from supermoe_jax.serving import loader

  encoder = loader.load_encoder(args.model)
  with ProgressBar(total=len(encoder.programs), desc="compiling", unit=" programs") as bar:
    encoder.warm_up(lambda *unused: bar.update())
  settings = service.ServiceSettings(
    limits=requests.Limits(body_bytes=args.most_bytes, users=args.most_users, events=args.most_events),
    wait=args.wait_ms / 1000,
    most_waiting=args.most_waiting,
  )
  uvicorn.run(service.make_app(encoder, settings), host=args.host, port=args.port, access_log=False)


def _listed(numbers: list[int]) -> str:
  return ", ".join(map(str, numbers))
