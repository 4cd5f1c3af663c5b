"""Runs the `supermoe` command.

Each verb imports the modules that it needs only when it runs, so that 'supermoe --help' does not wait for JAX.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from supermoe_jax.cli import console, data, embeddings, probing, search, serving, training
from supermoe_jax.errors import ExitCode, Stopped, SupermoeError


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the verb that `arguments` name; without them, the command line's.

  Returns:
    One of `errors.ExitCode`.
  """
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  with console.printed_messages():
    code = _main(arguments)
  if code and _watched():
    # A process that fails must not wait at its exit for other processes, which may be gone or hang.
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
    return ExitCode.USAGE
  if args.overrides and not hasattr(args, "config"):
    print(
      f"supermoe {args.verb}: {args.overrides[0]!r} has no effect here: a run keeps the config it was trained with",
      file=sys.stderr,
    )
    return ExitCode.USAGE
  try:
    from supermoe_jax import progress

    with progress.shown():
      code = args.run(args) or ExitCode.OK
    sys.stdout.flush()  # here, so that an error of standard output is not raised at the exit, as a traceback
    return code
  except KeyboardInterrupt:
    print(f"supermoe {args.verb}: interrupted", file=sys.stderr)
    return ExitCode.INTERRUPTED
  except (SupermoeError, Stopped) as error:
    # The message is enough; a stack trace would only hide it.
    if os.environ.get("SUPERMOE_TRACEBACK"):
      raise
    print(f"supermoe {args.verb}: {error}", file=sys.stderr)
    return ExitCode.RESUME if isinstance(error, Stopped) else ExitCode.ERROR
  except Exception as error:
    if isinstance(error, BrokenPipeError) and console.output_is_unread():
      return ExitCode.UNREAD
    if isinstance(error, OSError) and error.filename is not None and not os.environ.get("SUPERMOE_TRACEBACK"):
      print(f"supermoe {args.verb}: {error.filename}: {error.strerror}", file=sys.stderr)
      return ExitCode.ERROR
    if not _watched():
      raise
    traceback.print_exc()
    return ExitCode.CRASHED


def _watched() -> bool:
  """Returns whether a supervisor watches this process; see `distributed.supervisor`."""
  return "SUPERMOE_SUPERVISED" in os.environ


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="supermoe",
    description="Learns universal user representations from an event log.",
    epilog="--config.key=value sets any key of the config, for example --config.train.steps=100.",
  )
  verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
  data.add_data_verbs(verbs)
  training.add_training_verbs(verbs)
  embeddings.add_embedding_verbs(verbs)
  probing.add_probing_verbs(verbs)
  search.add_search_verbs(verbs)
  serving.add_serving_verbs(verbs)
  return parser
