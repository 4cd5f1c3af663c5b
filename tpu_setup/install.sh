#!/usr/bin/env bash
# Installs supermoe_jax with JAX for this machine's accelerator into .venv, says what it installed, and checks it.
#
#   tpu_setup/install.sh tpu     on a TPU VM
#   tpu_setup/install.sh cuda    on a machine with NVIDIA GPUs
#   tpu_setup/install.sh cpu     anywhere
set -euo pipefail
cd "$(dirname "$0")/.."

backend="${1:-}"
case "$backend" in
  tpu) extra="tpu" ;;
  cuda) extra="cuda13" ;;
  cpu) extra="" ;;
  *) echo "usage: $0 tpu|cuda|cpu" >&2; exit 2 ;;
esac

python="${PYTHON:-python3}"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet -e .
if [ -n "$extra" ]; then
  version=$(.venv/bin/python -c 'import jax; print(jax.__version__)')
  .venv/bin/python -m pip install --quiet "jax[$extra]==$version"
fi
.venv/bin/python tpu_setup/check_devices.py "$backend"
