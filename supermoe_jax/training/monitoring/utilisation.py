"""What share of a device's arithmetic a run puts to use (MFU)."""

from __future__ import annotations

import jax

from supermoe_jax import config
from supermoe_jax.models.parameters import Parameters

# Dense bfloat16 products a second of one device, by the beginning of its `device_kind`; the longest one that fits.
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
  """The peak of a kind of device, FLOP/s; None where it is not known, as of CPUs."""
  fits = [name for name in PEAKS if kind.startswith(name)]
  return PEAKS[max(fits, key=len)] if fits else None


def flops_a_token(model: config.Model, count: Parameters) -> float:
  """What the model asks for a token in training: 6 for each parameter at work, and 6·D for each event that it may see.

  What is computed again to save memory, and what fills up cells of experts, does not count.

  Source: the model FLOPs of PaLM, arXiv 2204.02311, appendix B; attention is causal.
  """
  return 6.0 * count.active + 6.0 * model.layers * model.d_model * model.max_events


def peak_share(flops: float, seconds: float, devices: int) -> float | None:
  """The share of the peak of `devices` that `flops` in so many seconds are; None where the peak is not known."""
  most = peak_flops(jax.devices()[0].device_kind)
  return round(flops / seconds / (devices * most), 4) if most else None
