"""Makes the vectors to compare embeddings with: hand-made aggregates of the same histories, and an untrained encoder.

Shapes: n rows, A aggregates, D the width of an embedding.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from supermoe_jax import config, device_mesh, sharding
from supermoe_jax.data.dataset import snapshot_batches
from supermoe_jax.data.dataset.dataset import Dataset, read_users
from supermoe_jax.data.encoding.vocabulary import Vocabulary
from supermoe_jax.data.format.schema import make_aggregator
from supermoe_jax.errors import DataError
from supermoe_jax.probing.vectors import UserVectors
from supermoe_jax.progress import ProgressBar
from supermoe_jax.training.checkpoints.checkpoint import RestoredModel
from supermoe_jax.training.run import Run
from supermoe_jax.training.step import abstract_model, model_constructor

COMPARISONS = ("aggregates", "untrained")

# If a run's config has no aggregates, this many values of each field with a vocabulary are counted.
TOP_VALUES = 20

USERS_AT_ONCE = 1024  # users in one call of the aggregator

# Up to this many times, the untrained encoder embeds all users at each; beyond, each user after their last event.
MOST_TIMES = 64


class Origin(NamedTuple):
  """A run's config and dataset."""

  workdir: pathlib.Path
  cfg: config.Config
  dataset: Dataset


def find_origin(about: dict[str, Any], workdir: pathlib.Path | None) -> Origin:
  """Returns the run that made the embeddings: `workdir`, the run named in `about`, or the embeddings' parent directory.

  `about` is the manifest of the embeddings.

  Raises:
    DataError: there is no such run, its dataset is gone, or the embeddings are of another run or other data.
    ConfigError: the run's config cannot be read.
  """
  directory = pathlib.Path(about["directory"]).absolute() if "directory" in about else None
  tried = [workdir] if workdir is not None else []
  if not tried and directory is not None:
    tried = [pathlib.Path(about["run"]), directory.parent] if about.get("run") else [directory.parent]
  found = next((w for w in tried if (w / "config.json").is_file()), None)
  if found is None:
    where = " nor ".join(map(str, tried)) or "a file of another system"
    raise DataError(
      f"there is no run at {where}; name it with --workdir." if tried else f"{where} names no run; add --workdir."
    )
  cfg = config.load_json(found / "config.json")
  if about.get("config_hash") not in (None, cfg.hash()):
    raise DataError(f"{directory} was made by another run than the one in {found}; name it with --workdir.")
  dataset = Dataset(cfg.data.path)
  dataset.check_matches(cfg, appended=False)
  if about.get("dataset") and about["dataset"]["digest"] != dataset.manifest["digest"]:
    raise DataError(
      f"{dataset.path} has changed since {directory} was made (by 'supermoe append' or 'prepare'), so its aggregates "
      "may include other events; embed again ('supermoe embed --since' reuses users without new events)."
    )
  return Origin(found, cfg, dataset)


def aggregate_vectors(origin: Origin, user: np.ndarray, time: np.ndarray) -> UserVectors:
  """Returns the aggregates of `user [n]` at `time [n]`, for the pairs with an earlier event.

  The run's config defines the aggregates, which are also inputs of its model. A config without them gets counts in the
  default windows.
  """
  data, encoders = origin.dataset.config.data, origin.dataset.encoders
  aggregator, own = origin.dataset.aggregator, True
  if aggregator is None:
    known = [n for n, e in encoders.categorical.items() if isinstance(e, Vocabulary)]
    usual = config.Aggregates(top_values=TOP_VALUES, fields=tuple(known))
    aggregator, own = make_aggregator(dataclasses.replace(data, aggregates=usual), encoders), False
    assert aggregator is not None
  order = np.argsort(user, kind="stable")
  begins = np.searchsorted(user[order], ids := np.unique(user))
  ends = np.append(begins[1:], len(user))
  place = {u: i for i, u in enumerate(ids.tolist())}
  everyone = read_users(origin.dataset.path, ["user"])["user"].to_pylist()
  wanted = [(index, place[u]) for index, u in enumerate(everyone) if u in place]
  asked, parts = [], []
  with ProgressBar(total=len(wanted), desc="aggregates", unit=" users", mininterval=1) as bar:
    for start in range(0, len(wanted), USERS_AT_ONCE):
      some = wanted[start : start + USERS_AT_ONCE]
      block = origin.dataset.histories(np.array([index for index, _ in some]))
      rows = [order[begins[i] : ends[i]] for _, i in some]
      owner, row = np.repeat(np.arange(len(some)), [len(r) for r in rows]), np.concatenate(rows)
      n_events = block.before(owner, time[row])
      seen = n_events > 0
      if seen.any():
        parts.append(aggregator(block, owner[seen], time[row[seen]], n_events[seen]))
        asked.append(row[seen])
      bar.update(len(some))
  if not parts:
    raise DataError(f"no user with a label has an event in {origin.dataset.path} before the times to probe at.")
  about = {"dataset": str(origin.dataset.path), "of_the_config": own, "width": len(aggregator.names)}
  found = np.concatenate(asked)
  return UserVectors("aggregates", user[found], time[found], np.concatenate(parts), about)


def untrained_vectors(origin: Origin, time: np.ndarray, seed: int) -> UserVectors:
  """Returns embeddings of all users by an encoder of the run's config with freshly initialised parameters.

  They are at the times in `time`, or, if these are more than `MOST_TIMES`, just after each user's last event.
  """
  times: list[int | None] = np.unique(time).tolist()
  if len(times) > MOST_TIMES:
    times = [None]
  cfg = origin.cfg
  mesh = device_mesh.make_mesh(config.Mesh(), jax.devices()[:1])
  platform = mesh.devices.flat[0].platform
  make = model_constructor(cfg, origin.dataset.schema, platform)
  graph, _ = abstract_model(cfg, origin.dataset.schema, platform)
  variables = nnx.state(sharding.create(lambda: make(jax.random.key(seed)), mesh))
  run = Run.of(origin.workdir, cfg, origin.dataset, mesh, graph, RestoredModel(0, variables, {}))
  ids: list[str] = []
  at, parts = [], []
  total = len(origin.dataset) * len(times)
  with ProgressBar(total=total, desc="untrained encoder", unit=" rows", mininterval=1) as bar:
    for batch in snapshot_batches.query_batches(origin.dataset, cfg, times=times):
      n = len(batch.questions)
      parts.append(np.asarray(run.encode(batch.features))[:n])
      ids += [q.user_id for q in batch.questions]
      at += [q.time for q in batch.questions]
      bar.update(n)
  if not parts:
    raise DataError(f"no user has an event in {origin.dataset.path} before the times to probe at.")
  about = {"run": str(origin.workdir), "seed": seed, "config": json.loads(json.dumps(config.to_dict(cfg.model)))}
  return UserVectors("untrained", np.array(ids, object), np.array(at, np.int64), np.concatenate(parts), about)
