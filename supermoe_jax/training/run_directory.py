"""Ties a run directory to one config and one encoding of events."""

from __future__ import annotations

import json
import pathlib

from supermoe_jax import atomic_files, config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.errors import RunError

# Training settings that may change when a run resumes: what it learns does not depend on them.
MAY_CHANGE = ("mesh", "workers", "checkpoint_every", "checkpoints_kept", "nonfinite_steps", "hang_seconds")


def check_directory(workdir: pathlib.Path) -> None:
  """Checks that `workdir` is, or can become, a run directory.

  Raises:
    RunError: it is a file, lies in one, or holds a prepared dataset or embeddings.
  """
  for path in (workdir, *workdir.parents):
    if path.exists() and not path.is_dir():
      raise RunError(f"--workdir={workdir}: {path} is a file; name a directory for the run.")
  if (kind := atomic_files.manifest_kind(workdir)) is not None:
    raise RunError(f"--workdir={workdir} holds another kind of directory ({kind}); name one of its own for the run.")


def claim_directory(workdir: pathlib.Path, cfg: config.Config) -> None:
  """Makes `workdir` the run directory of this config, or checks that it already is.

  Raises:
    RunError: `workdir` holds a run of another config.
  """
  file = workdir / "config.json"
  if not file.is_file():
    workdir.mkdir(parents=True, exist_ok=True)
    config.save(cfg, file)
    return
  old, new = config.to_dict(config.load_json(file)), config.to_dict(cfg)
  for whole in (old, new):
    for name in MAY_CHANGE:
      del whole["train"][name]
  if old != new:
    changed = config.differences(old, new)
    raise RunError(
      f"{workdir} holds a run of another config ({'; '.join(changed[:4])}). Name another --workdir, or delete this one."
    )


def check_encoding(workdir: pathlib.Path, dataset: Dataset, *, create: bool = False) -> None:
  """Checks that the dataset has the encoding of events that a run was trained with; `create` records a new run's.

  An encoding that `supermoe append` has extended since counts as the same: old codes stay, and new ones follow.

  Raises:
    RunError: the dataset was prepared again, and its vocabularies or statistics have changed.
  """
  file, manifest = workdir / "encoding.json", dataset.manifest
  if create and not file.is_file():
    atomic_files.write_file(file, json.dumps({"encoding_hash": manifest["encoding_hash"]}) + "\n")
  known = {manifest["encoding_hash"], *(a["encoding_before"] for a in manifest.get("appends", ()))}
  if json.loads(file.read_text())["encoding_hash"] not in known:
    raise RunError(
      f"{dataset.path} was prepared again since {workdir} was trained, and its vocabularies or statistics are others: "
      "the run's parameters do not fit them. Train again in another --workdir."
    )
