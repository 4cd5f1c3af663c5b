"""What stands beside embeddings: hand-made aggregates of the same histories, and an untrained encoder.

Shapes: n rows, A aggregates, D the width of an embedding.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from supermoe_jax import config, sharding
from supermoe_jax.data import batches
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.data.readers import DataError
from supermoe_jax.data.schema import make_aggregator
from supermoe_jax.data.vocabulary import Vocabulary
from supermoe_jax.evaluation.probing.features import Features
from supermoe_jax.training.checkpoint import RestoredModel
from supermoe_jax.training.run import Run
from supermoe_jax.training.step import abstract_model, build

BESIDE = ("aggregates", "untrained")

# What is counted where a run's config has no aggregates of its own: this many values of each field with a vocabulary.
TOP_VALUES = 20


class Origin(NamedTuple):
  """A run's config and dataset."""

  workdir: pathlib.Path
  cfg: config.Config
  dataset: Dataset


def find(about: dict[str, Any], workdir: pathlib.Path | None) -> Origin:
  """The run that embeddings are of: `workdir`, or what their manifest (in `about`) names, or the directory they lie in.

  Raises:
    DataError: no run is at hand, its dataset is gone, or the embeddings are of other data.
    ConfigError: its config cannot be read.
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
  dataset.check_matches(cfg)
  if about.get("data_hash") not in (None, dataset.manifest["data_hash"]):
    raise DataError(f"{directory} was made of other data than {dataset.path} holds now; embed again.")
  return Origin(found, cfg, dataset)


def aggregates(origin: Origin, users: Collection[str], times: Sequence[int]) -> Features:
  """The aggregates of these users at these times, of those with an event before.

  They are those of the run's config, which its queries see; where it has none, counts in the usual windows.
  """
  data, encoders = origin.dataset.config.data, origin.dataset.encoders
  aggregator, own = origin.dataset.aggregator, True
  if aggregator is None:
    known = [n for n, e in encoders.categorical.items() if isinstance(e, Vocabulary)]
    usual = config.Aggregates(top_values=TOP_VALUES, fields=tuple(known))
    aggregator, own = make_aggregator(dataclasses.replace(data, aggregates=usual), encoders), False
    assert aggregator is not None
  ids: list[str] = []
  at, parts = [], []
  asked = np.array(times, np.int64)
  for index in tqdm(range(len(origin.dataset)), desc="aggregates", unit=" users", mininterval=1):
    record = origin.dataset[index]
    if record["user"] not in users:
      continue
    history = origin.dataset.history(record)
    n_events = np.searchsorted(history.time, asked, side="left")
    some = n_events > 0
    if some.any():
      parts.append(aggregator(history.block, np.zeros(some.sum(), np.int64), asked[some], n_events[some]))
      ids += [history.user] * int(some.sum())
      at.append(asked[some])
  if not parts:
    raise DataError(f"no user with a label has an event in {origin.dataset.path} before the times asked about.")
  about = {"dataset": str(origin.dataset.path), "of_the_config": own, "width": len(aggregator.names)}
  return Features("aggregates", np.array(ids, object), np.concatenate(at), np.concatenate(parts), about)


def untrained(origin: Origin, times: Sequence[int], seed: int) -> Features:
  """Embeddings by an encoder of the run's config with fresh parameters, of all users at these times."""
  cfg = origin.cfg
  mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
  platform = mesh.devices.flat[0].platform
  make = build(cfg, origin.dataset.schema, platform)
  graph, _ = abstract_model(cfg, origin.dataset.schema, platform)
  variables = nnx.state(sharding.create(lambda: make(jax.random.key(seed)), mesh))
  run = Run.of(origin.workdir, cfg, origin.dataset, mesh, graph, RestoredModel(0, variables, {}))
  ids: list[str] = []
  at, parts = [], []
  total = len(origin.dataset) * len(times)
  with tqdm(total=total, desc="untrained encoder", unit=" rows", mininterval=1) as bar:
    for batch in batches.questions(origin.dataset, cfg, times=times):
      n = len(batch.questions)
      parts.append(np.asarray(run.answer(batch.features).z)[:n])
      ids += [q.user_id for q in batch.questions]
      at += [q.time for q in batch.questions]
      bar.update(n)
  if not parts:
    raise DataError(f"no user has an event in {origin.dataset.path} before the times asked about.")
  about = {"run": str(origin.workdir), "seed": seed, "config": json.loads(json.dumps(config.to_dict(cfg.model)))}
  return Features("untrained", np.array(ids, object), np.array(at, np.int64), np.concatenate(parts), about)
