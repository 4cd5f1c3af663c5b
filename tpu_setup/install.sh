#!/usr/bin/env bash
# Installs supermoe_jax with JAX for this machine's accelerator into .venv, says what it installed, and checks it.
#
#   tpu_setup/install.sh tpu     on a TPU VM
#   tpu_setup/install.sh cuda    on a machine with NVIDIA GPUs
#   tpu_setup/install.sh cpu     anywhere
#
#   PYTHON=python3.11 tpu_setup/install.sh …   makes .venv with another Python than python3
#   --check false    does not look for the accelerator: where an image is made there is none
#   --dry-run        prints the commands, and runs none of them
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

parse "$@" <<'DEFAULTS'
CHECK=true
DEFAULTS
need CHECK
backend="${words[0]:-}"
case "$backend" in
  tpu) extra="tpu" ;;
  cuda) extra="cuda13" ;;
  cpu) extra="" ;;
  *) die "which accelerator: tpu, cuda or cpu? see $0 --help" ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -n "$dry_run" ] || [ ! -x .venv/bin/python ]; then run "${PYTHON:-python3}" -m venv .venv; fi
run .venv/bin/python -m pip install --quiet -e .
if [ -n "$extra" ]; then
  # The one that is there already: all hosts of a run need the same.
  version=""
  [ -n "$dry_run" ] || version=$(.venv/bin/python -c 'import jax; print(jax.__version__)')
  run .venv/bin/python -m pip install --quiet "jax[$extra]==${version:-VERSION}"
fi
if [ "${pod[CHECK]}" = true ]; then run .venv/bin/python tpu_setup/check_devices.py "$backend"; fi
