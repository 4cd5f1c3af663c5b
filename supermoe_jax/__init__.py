"""Universal user representations with a sparse Mixture-of-Experts transformer.

    import supermoe_jax as sm

    cfg = sm.load_config("experiments/complete_journey.py")
    dataset = sm.prepare(cfg)
    run = sm.train(cfg, "runs/first")
    run.evaluate()
    embeddings = run.embed("2017-10-01")

Names are imported when they are first used, so that `supermoe --help` does not wait for JAX. `__init__.pyi` has their
types.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

# The module of each public name.
_PUBLIC = {
  **dict.fromkeys(("load_config", "inspect", "prepare"), "supermoe_jax.api.data"),
  **dict.fromkeys(("Evaluation", "Run", "train"), "supermoe_jax.api.runs"),
  **dict.fromkeys(("Embeddings", "ProbeReport", "neighbors", "probe"), "supermoe_jax.api.embeddings"),
  "load_encoder": "supermoe_jax.serving.loader",
  "read_embeddings": "supermoe_jax.embeddings.embedding_files",
  **dict.fromkeys(
    ("ConfigError", "DataError", "RunError", "SimulationError", "Stopped", "StudyError", "SupermoeError"),
    "supermoe_jax.errors",
  ),
}

__all__ = ["__version__", *_PUBLIC]

logging.getLogger(__name__).addHandler(logging.NullHandler())  # a library speaks where its user listens


def __getattr__(name: str) -> Any:
  if name == "__version__":
    return importlib.import_module("importlib.metadata").version(__name__)
  if name not in _PUBLIC:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
