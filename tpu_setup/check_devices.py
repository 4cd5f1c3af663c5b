"""Says which devices JAX sees and computes something on each; fails if they are not of the kind that was asked for."""

import socket
import sys

import jax
import jax.numpy as jnp

PLATFORMS = {"tpu": ("tpu",), "cuda": ("gpu", "cuda"), "cpu": ("cpu",)}


def main(wanted: str) -> int:
  """Checks this host; returns the exit code."""
  devices = jax.local_devices()
  kinds = sorted({d.device_kind for d in devices})
  print(f"{socket.gethostname()}: jax {jax.__version__}, {len(devices)} × {', '.join(kinds)} ({devices[0].platform})")
  if devices[0].platform not in PLATFORMS[wanted]:
    print(
      f"expected {wanted}: another JAX is installed, or the driver is missing; see tpu_setup/README.md", file=sys.stderr
    )
    return 1
  for device in devices:
    total = float(jax.device_put(jnp.ones((128, 128)), device).sum())
    if total != 128 * 128:
      print(f"{device} computed {total}, not {128 * 128}", file=sys.stderr)
      return 1
  print("each device computes")
  return 0


if __name__ == "__main__":
  if len(sys.argv) != 2 or sys.argv[1] not in PLATFORMS:
    raise SystemExit(f"usage: {sys.argv[0]} {'|'.join(PLATFORMS)}")
  raise SystemExit(main(sys.argv[1]))
