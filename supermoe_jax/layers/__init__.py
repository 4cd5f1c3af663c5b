"""Layers that can be used alone: attention over time, Mixture of Experts, embedding tables, heads.

Each runs on one device without a mesh, and on a mesh made by `supermoe_jax.device_mesh.make_mesh`. A layer is imported
when it is first used, so that one file can be read, and loaded, without the others.
"""

from __future__ import annotations

import importlib
from typing import Any

# The module of each public name.
_PUBLIC = {
  "Attention": "attention",
  "Block": "transformer",
  "EmbeddingTable": "table",
  "MoE": "moe",
  "Mlp": "moe",
  "Router": "routing",
  "Stack": "transformer",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
  if name not in _PUBLIC:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
