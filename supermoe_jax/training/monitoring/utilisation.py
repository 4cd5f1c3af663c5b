"""Computes the share of the devices' peak arithmetic that a run uses (MFU)."""

from __future__ import annotations

import jax

from supermoe_jax import config
from supermoe_jax.models.parameters import Parameters

# Dense bfloat16 FLOP/s of one device, by the beginning of its `device_kind`; the longest match counts.
# Sources: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, TPU7x), NVIDIA's data sheets (A100, H100, H200, B200).
PEAKS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 2307e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA B200": 2250e12,
}


def peak_flops(kind: str) -> float | None:
  """Returns the peak of a kind of device in FLOP/s; None if it is not known, as for CPUs."""
  fits = [name for name in PEAKS if kind.startswith(name)]
  return PEAKS[max(fits, key=len)] if fits else None


def flops_a_token(model: config.Model, count: Parameters) -> float:
  """Returns the FLOPs for a token in training: 6 per active parameter, and 6·D per layer and event that it may see.

  Recomputation to save memory, and the padding of experts' buffers, do not count.

  Source: the model FLOPs of PaLM, arXiv 2204.02311, appendix B; attention is causal.
  """
  return 6.0 * count.active + 6.0 * model.layers * model.d_model * model.max_events


def peak_share(flops: float, seconds: float, devices: int) -> float | None:
  """Returns `flops` in `seconds` as a share of the peak of `devices` devices; None if the peak is not known."""
  most = peak_flops(jax.devices()[0].device_kind)
  return round(flops / seconds / (devices * most), 4) if most else None
