"""Exports an encoder for use without the training code: StableHLO for CPU, GPU and TPU, and its preprocessing.

    manifest.json          run, step, hashes, shapes, platforms and versions of the export
    program-BxL.stablehlo  the encoder lowered for B rows of L events, for all platforms in one file
    parameters/n.npy       the encoder's parameters, which all programs share; embedding tables as plain rows
    preprocessing.json     how values and times are read; further files hold vocabularies and tables of items

`serving.loader` reads the directory with JAX and NumPy alone. A mixture of experts without drops derives its blocks
from the batch's shape, so programs have fixed shapes, and users are cut into batches of these shapes. Parameters are
arguments, not constants. A table whose rows share lines on a TPU (`layers.tpu_lines`) is written as plain rows, for
every platform. There is no export to ONNX or SavedModel: JAX has no converter to ONNX, and its converter to SavedModel
(`jax2tf`) is experimental and needs TensorFlow, which nothing else here needs.

Shapes: B rows, L events, D width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from supermoe_jax import atomic_files, config
from supermoe_jax.batch import Features
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.reading import readers
from supermoe_jax.errors import ConfigError, DataError
from supermoe_jax.layers import exchange
from supermoe_jax.layers.table import TableRows
from supermoe_jax.progress import ProgressBar
from supermoe_jax.serving import json_columns
from supermoe_jax.serving import stablehlo as stablehlo_lib
from supermoe_jax.serving.loader import KIND, MANIFEST, PARAMETERS
from supermoe_jax.serving.preprocessing import Preprocessing
from supermoe_jax.serving.spec import PreprocessingSpec
from supermoe_jax.training.run import Run
from supermoe_jax.training.step import abstract_model

FORMAT = 1

BATCH_SIZES = (1, 8, 64)
SHORTEST = 32  # events of the shortest program; each next program is twice as long


def program_lengths(max_events: int) -> list[int]:
  """Returns the default lengths of programs: powers of two from `SHORTEST`, and `max_events`."""
  powers = [1 << i for i in range(SHORTEST.bit_length() - 1, max_events.bit_length()) if 1 << i < max_events]
  return [*powers, max_events]


def export_encoder(
  run: Run,
  out: pathlib.Path,
  *,
  batch_sizes: Sequence[int] = BATCH_SIZES,
  events: Sequence[int] = (),
  overwrite: bool = False,
) -> dict[str, Any]:
  """Writes a run's encoder and its preprocessing into the directory `out`, whole or not at all; returns the manifest.

  The columns of the event files are looked up again, and the tables of items read again: all these files must still be
  where preparation found them.

  Args:
    run: the trained run.
    out: the directory.
    batch_sizes: the B of programs.
    events: the L of programs, to which `max_events` is always added; empty means `program_lengths`.
    overwrite: whether to replace an encoder in `out`.

  Raises:
    ConfigError: a size is out of range.
    DataError: `out` cannot be replaced, an event file is gone, or the disk is full.
  """
  longest = run.cfg.model.max_events
  sizes = sorted(set(batch_sizes)), sorted({*(events or program_lengths(longest)), longest})
  if not sizes[0] or sizes[0][0] < 1 or sizes[1][0] < 1 or sizes[1][-1] > longest:
    raise ConfigError(
      f"batch sizes {sizes[0]} and lengths {sizes[1]} must be at least 1, and lengths at most "
      f"config.model.max_events={longest}."
    )
  atomic_files.check_replaceable(
    out,
    KIND,
    (
      MANIFEST,
      "program-*.stablehlo",
      PARAMETERS,
      "preprocessing.json",
      "vocabulary-*.json",
      "items-*.*",
      "factors-*.npy",
    ),
  )
  if out.exists() and any(out.iterdir()) and not overwrite:
    raise DataError(f"{out} holds an exported encoder and is not overwritten; name another --out, or add --overwrite.")
  try:
    with atomic_files.replacing_directory(out) as work:
      return _write(run, work, *sizes)
  except OSError as error:
    raise DataError(f"writing the encoder to {out} failed: {error}; nothing was kept.") from error


def _write(run: Run, work: pathlib.Path, batch_sizes: Sequence[int], events: Sequence[int]) -> dict[str, Any]:
  preprocessing = make_preprocessing(run.dataset, run.cfg.model.max_events)
  preprocessing.save(work)
  graph, variables = single_device_run(run)
  encode, parameters = _function(graph, variables)
  kept = _write_parameters(parameters, work)
  programs = []
  with ProgressBar(total=len(batch_sizes) * len(events), desc="lowering", unit=" programs") as bar:
    for length in events:
      row = preprocessing.row(preprocessing.empty, 0, length)
      for batch in batch_sizes:
        facts, stablehlo = stablehlo_lib.lower_program(encode, parameters, row, batch)
        file = f"program-{batch}x{length}.stablehlo"
        (work / file).write_bytes(stablehlo)
        programs.append({"file": file, **dataclasses.asdict(facts)})
        bar.update()
  manifest = {
    "kind": KIND,
    "format": FORMAT,
    "run": str(run.workdir),
    "step": run.step,
    "config_hash": run.cfg.hash(),
    "data_hash": run.cfg.data_hash(),
    "encoding_hash": run.dataset.manifest["encoding_hash"],
    "width": run.cfg.model.d_model,
    "max_events": run.cfg.model.max_events,
    "batch_sizes": list(batch_sizes),
    "lengths": list(events),
    "platforms": list(stablehlo_lib.PLATFORMS),
    "jax_version": jax.__version__,
    "calling_convention": programs[0]["calling_convention"],
    "programs": programs,
    "parameters": kept,
    "files": {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(work.iterdir()) if f.is_file()},
  }
  (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
  return manifest


def _write_parameters(parameters: dict[str, np.ndarray], work: pathlib.Path) -> dict[str, dict[str, Any]]:
  (work / PARAMETERS).mkdir()
  kept = {}
  for i, (name, value) in enumerate(parameters.items()):
    file = f"{PARAMETERS}/{i}.npy"
    np.save(work / file, stablehlo_lib.storable(value), allow_pickle=False)
    kept[name] = {
      "file": file,
      "shape": list(value.shape),
      "dtype": str(value.dtype),
      "bytes": (work / file).stat().st_size,
    }
  return kept


def single_device_run(run: Run) -> tuple[nnx.GraphDef, nnx.State]:
  """Returns a run's encoder as laid out for one device other than a TPU, with every variable on the host."""
  one = dataclasses.replace(run.cfg, train=dataclasses.replace(run.cfg.train, mesh=config.Mesh()))
  graph, abstract = abstract_model(one, run.dataset.schema, "cpu")
  shapes = {path: v.get_value().shape for path, v in nnx.to_flat_state(abstract)}

  def laid_out(path: tuple[Any, ...], variable: nnx.Variable) -> np.ndarray:
    value = variable.get_value()
    if isinstance(variable, TableRows) and value.shape != shapes[path]:
      value = jax.jit(exchange.restriped, static_argnums=1)(value, shapes[path])
    return np.asarray(value)

  flat = [(path, v.replace(laid_out(path, v))) for path, v in nnx.to_flat_state(run.variables)]
  return nnx.split(nnx.merge(graph, nnx.from_flat_state(flat)).encoder)


def _function(
  graph: nnx.GraphDef, variables: nnx.State
) -> tuple[Callable[[stablehlo_lib.Parameters, tuple[Any, ...]], jax.Array], dict[str, np.ndarray]]:
  """Returns the function `(parameters, features) → z [B, D]`, and its parameters by name."""
  flat = nnx.to_flat_state(variables)
  names = [".".join(map(str, path)) for path, _ in flat]

  def encode(parameters: stablehlo_lib.Parameters, features: tuple[Any, ...]) -> jax.Array:
    state = nnx.from_flat_state([(p, v.replace(parameters[n])) for n, (p, v) in zip(names, flat, strict=True)])
    encoder = nnx.merge(graph, state, copy=True)
    return encoder(Features(*features), dropless=True).z[:, 0].astype(jnp.float32)

  return encode, {n: v.get_value() for n, (_, v) in zip(names, flat, strict=True)}


def make_preprocessing(dataset: Dataset, max_events: int) -> Preprocessing:
  """Returns preprocessing that reads JSON as preparation read the event files, for rows of at most `max_events`.

  Raises:
    DataError: an event file is gone, or cannot be read.
  """
  data = dataset.config.data
  con = readers.connect(memory=data.memory)
  try:
    found = json_columns.ColumnKinds(con, data)
    sources, items = found.sources()
    spec = PreprocessingSpec(
      max_events,
      sources,
      json_columns.field_specs(data),
      found.user_columns(),
      data.extra_value_fields,
      dataset.hidden_codes,
      dataset.hidden_numeric,
      data.duplicates == "drop",
    )
  finally:
    con.close()
  statistics = {"mean": dataset.aggregate_mean.tolist(), "scale": dataset.aggregate_scale.tolist()}
  assert all(math.isfinite(x) for of in statistics.values() for x in of)
  encoders = dataset.encoders
  return Preprocessing(spec, encoders.categorical, encoders.numeric, dataset.aggregator, statistics, items)
