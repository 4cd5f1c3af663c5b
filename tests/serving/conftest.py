"""An exported encoder of the small run, and its raw events as a client would send them."""

import datetime
import pathlib
from typing import Any

import pyarrow.parquet as pq
import pytest

from supermoe_jax.serving import loader
from supermoe_jax.serving.loader import ExportedEncoder
from tests.fixtures import exported_encoder


def as_json(value: Any) -> Any:
  return value.isoformat() if isinstance(value, datetime.date) else value


@pytest.fixture(scope="session")
def exported(workdir: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Programs for batches of 1 and 4 rows, of 8 and 24 events; do not change it."""
  return exported_encoder.made(tmp_path_factory, workdir)


@pytest.fixture(scope="session")
def encoder(exported: pathlib.Path) -> ExportedEncoder:
  found = loader.load_encoder(exported)
  found.warm_up()
  return found


@pytest.fixture(scope="session")
def raw_users(log_folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Each user's rows of the event files as JSON, by the user's id."""
  found: dict[str, dict[str, Any]] = {}
  for source in ("visits", "buys"):
    for row in pq.read_table(log_folder / f"{source}.parquet").to_pylist():
      of_user = found.setdefault(str(row.pop("user")), {"events": {"visits": [], "buys": []}})
      of_user["events"][source].append({k: as_json(v) for k, v in row.items()})
  return found
