#!/usr/bin/env bash
# What is done on one host of a pod; pod.sh calls it on all of them. Run it from the repository's root.
#
#   tpu_setup/host.sh install [--python PYTHON] [--shared DIR --shared-source SERVER:/SHARE]
#       Mounts the shared disk, sees to a Python, and installs this project with JAX for TPUs.
#   tpu_setup/host.sh start --workdir DIR [--restarts N] -- COMMAND…
#       Starts COMMAND in the background under run_host.sh. If it runs already, says so and does nothing.
#   tpu_setup/host.sh resume --workdir DIR [--restarts N] -- COMMAND…
#       The same, for a run directory that was begun before.
#   tpu_setup/host.sh logs --workdir DIR [--lines N]
#       Shows the last lines of the log, and follows it until it is interrupted.
#   tpu_setup/host.sh health --workdir DIR [--process NUMBER]
#       Is the process alive, how far is the run, which chips are there, how much disk is free. Code 1: not alive.
#   tpu_setup/host.sh stop --workdir DIR [--seconds N]
#       Sends SIGTERM, which saves the run, and waits for the end, N seconds at most; default: 600.
#   tpu_setup/host.sh count PATH
#       Files and bytes of a directory or file, or of a gs:// address.
#   tpu_setup/host.sh compare PATH FILES BYTES
#       Code 1, and what differs, if PATH does not hold so many files and bytes.
#
# With --dry-run those that do something print their commands instead; health, count and compare only look.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

install_host() {
  need PYTHON
  # Another process may be at work on its packages for some minutes after a start.
  local get=(sudo apt-get -q -y -o DPkg::Lock::Timeout=300)
  if [ -n "${pod[SHARED_SOURCE]}" ]; then
    need SHARED
    if [ -n "$dry_run" ] || ! mountpoint -q "${pod[SHARED]}"; then
      run "${get[@]}" install nfs-common
      run sudo mkdir -p "${pod[SHARED]}"
      # What one host wrote, the others must see within ten seconds.
      run sudo mount -t nfs -o actimeo=3 "${pod[SHARED_SOURCE]}" "${pod[SHARED]}"
    fi
    # A new Filestore share belongs to root.
    if [ -n "$dry_run" ] || ! [ -w "${pod[SHARED]}" ]; then run sudo chmod 1777 "${pod[SHARED]}"; fi
  fi
  # The system's own Python may be too old: Ubuntu 22.04 has 3.10.
  if [ -n "$dry_run" ] || ! "${pod[PYTHON]}" -c 'import venv, ensurepip' 2>/dev/null; then
    run "${get[@]}" update
    run "${get[@]}" install "${pod[PYTHON]}" "${pod[PYTHON]}-venv"
  fi
  # Alone, a host of several sees no chip: pod.sh checks all of them together.
  run env "PYTHON=${pod[PYTHON]}" tpu_setup/install.sh tpu --check false
}

# Where the log and the number of the process of a run directory lie: on the host's own disk, whatever becomes of the
# shared one.
file_of() {
  local name=${pod[WORKDIR]#/}
  echo "runs/hosts/${name//\//_}.$1"
}

start() {
  local log pid number launch
  need WORKDIR RESTARTS
  [ "${#rest[@]}" -gt 0 ] || die "there is no command; it goes behind --"
  log=$(file_of log) pid=$(file_of pid)
  if number=$(running "$pid"); then
    echo "$host: runs already, as process $number; log: $PWD/$log"
    return
  fi
  launch=(tpu_setup/run_host.sh --restarts "${pod[RESTARTS]}" --log "$log" --pid "$pid" -- "${rest[@]}")
  if [ -n "$dry_run" ]; then
    quoted "${launch[@]}"
    return
  fi
  # Lines reach the log as they are printed; the end of the connection that started it is none of the run's business.
  PYTHONUNBUFFERED=1 nohup setsid "${launch[@]}" </dev/null >/dev/null 2>&1 &
  for _ in {1..50}; do
    if number=$(running "$pid"); then
      echo "$host: started, as process $number; log: $PWD/$log"
      return
    fi
    sleep 0.2
  done
  fail "$host: it did not start, or ended at once; see $PWD/$log"
}

health() {
  local number chips alive=0
  need WORKDIR
  if [ -n "${pod[PROCESS]}" ]; then
    number=${pod[PROCESS]}
    kill -0 "$number" 2>/dev/null || alive=1
  else
    number=$(running "$(file_of pid)") || alive=1
  fi
  {
    if [ "$alive" -eq 0 ]; then
      echo "process $number is alive, since $(ps -o etime= -p "$number" 2>/dev/null | tr -d ' ' || true)"
    else
      echo "NO process is alive; the log ends with: $(tail -n 1 "$(file_of log)" 2>/dev/null || echo nothing)"
    fi
    chips=$(find /dev -path '/dev/accel[0-9]*' -o -path '/dev/vfio/[0-9]*' 2>/dev/null | wc -l)
    echo "chips: $((chips))"
    df -h --output=avail,pcent,target "${pod[WORKDIR]}" "$PWD" 2>/dev/null | tail -n +2 | sed 's/^ */disk free: /'
    if [ -f "${pod[WORKDIR]}/metrics.jsonl" ]; then
      tail -n 2 "${pod[WORKDIR]}/metrics.jsonl" | cut -c 1-200 | sed 's/^/metrics: /'
    else
      echo "metrics: ${pod[WORKDIR]}/metrics.jsonl is not there yet"
    fi
  } | sed "s/^/$host: /"
  return "$alive"
}

stop() {
  local number second
  need WORKDIR SECONDS
  if ! number=$(running "$(file_of pid)"); then
    echo "$host: nothing runs"
    return
  fi
  run kill -TERM "$number"
  [ -z "$dry_run" ] || return 0
  for ((second = 0; second < pod[SECONDS]; second++)); do
    if ! running "$(file_of pid)" >/dev/null; then
      tail -n 3 "$(file_of log)" | sed "s/^/$host: /"
      return
    fi
    sleep 1
  done
  fail "$host: process $number is still there after ${pod[SECONDS]} s; it may be saving: look at the log"
}

count() {
  local sizes
  case "$1" in
    gs://*) sizes=$(gcloud storage du "${1%/}/**" | awk '!/\/$/ { print $1 }') ;;
    *)
      [ -e "$1" ] || fail "$host: there is no $1"
      sizes=$(find -L "$1" -type f -exec stat -c %s {} + 2>/dev/null || find -L "$1" -type f -exec stat -f %z {} +)
      ;;
  esac
  awk 'NF { files++; bytes += $1 } END { printf "%d %.0f\n", files, bytes }' <<<"$sizes"
}

compare() {
  local found
  found=$(count "$1")
  [ "$found" = "$2 $3" ] || fail "$host: $1 holds ${found/ / files, } bytes, not $2 files, $3 bytes"
  echo "$host: $1 holds $2 files, $3 bytes, as sent"
}

parse "$@" <<'DEFAULTS'
WORKDIR=
RESTARTS=10
PYTHON=python3.11
SHARED=
SHARED_SOURCE=
LINES=50
SECONDS=600
PROCESS=
DEFAULTS
case "${words[0]:-}" in
  install) install_host ;;
  start) start ;;
  resume)
    need WORKDIR
    [ -e "${pod[WORKDIR]}/config.json" ] ||
      fail "$host: ${pod[WORKDIR]} holds no run that was begun; launch one, or see whether the disk is mounted"
    start
    ;;
  logs)
    need WORKDIR LINES
    run tail -n "${pod[LINES]}" -F "$(file_of log)"
    ;;
  health) health ;;
  stop) stop ;;
  count) count "${words[1]:?PATH is missing}" ;;
  compare) compare "${words[1]:?PATH is missing}" "${words[2]:?FILES is missing}" "${words[3]:?BYTES is missing}" ;;
  *) die "unknown verb ${words[0]:-(none)}; see $0 --help" ;;
esac
