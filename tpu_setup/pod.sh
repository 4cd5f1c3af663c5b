#!/usr/bin/env bash
# Brings a run onto a pod of Cloud TPU VMs: one slice, or several of the same kind.
#
#   tpu_setup/pod.sh VERB [--pod FILE] [--SETTING VALUE …] [--dry-run] [--yes] [-- ARGUMENT…]
#
#   create     asks for the slices (a queued resource) and waits until they are there; costs money: needs --yes
#   wait       goes on waiting for them
#   install    clones REPOSITORY at REVISION on every host, mounts the shared disk, installs JAX for TPUs, checks all
#   check      makes sure that JAX sees all chips, and that all hosts have the same versions, CONFIG and dataset
#   copy SRC DEST   SRC, a directory or gs:// address, to DEST on the shared disk (by way of BUCKET); a file to every
#                   host. Then compares the number of files and bytes
#   launch     starts `supermoe train --config CONFIG --workdir WORKDIR ARGUMENT…` on every host, in the background;
#              it is restarted when it ends with code 75 or by a signal. In a directory that was begun it goes on. Of
#              several slices it is told by --config.train.mesh.slices
#   resume     the same, and an error where nothing was begun
#   logs       shows the log of every host, or of --worker I of --slice J, and follows it
#   health     of every host: is the process alive, how far is the run, chips, free disk
#   stop       SIGTERM on every host: the run is saved and ends
#   ssh        runs the command behind -- on every host, or on --worker I of --slice J
#   delete     deletes the slices, and what is on their disks: needs --yes
#
# Settings stand in FILE as lines KEY=VALUE, or are flags: ZONE=us-west4-a is --zone us-west4-a. A flag goes before the
# file. tpu_setup/pod.env.example names and explains all.
#
# --dry-run prints the commands, one a line, and runs none of them.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

parse "$@" <<'DEFAULTS'
NAME=
PROJECT=
ZONE=
ACCELERATOR=
RUNTIME=
SPOT=false
SLICES=1
NETWORK=
REPOSITORY=
REVISION=
DIRECTORY=supermoe_jax
PYTHON=python3.11
SHARED=
SHARED_SOURCE=
BUCKET=
CONFIG=
WORKDIR=
RESTARTS=10
POLL=30
WORKER=all
SLICE=all
LINES=50
DEFAULTS
verb=${words[0]:-}
[ -n "$verb" ] || die "which verb? see $0 --help"
[ "$verb" = copy ] || [ "${#words[@]}" -eq 1 ] ||
  die "unexpected ${words[1]}; what is for supermoe train goes behind --"

# The names of the slices, as Cloud TPU gives them.
nodes() {
  local i
  if [ "${pod[SLICE]}" != all ] && [ "${pod[SLICE]}" -ge "${pod[SLICES]}" ]; then
    die "--slice ${pod[SLICE]} must be less than SLICES=${pod[SLICES]}; the first is 0"
  elif [ "${pod[SLICES]}" -eq 1 ]; then
    echo "${pod[NAME]}"
  elif [ "${pod[SLICE]}" != all ]; then
    echo "${pod[NAME]}-${pod[SLICE]}"
  else
    for ((i = 0; i < pod[SLICES]; i++)); do echo "${pod[NAME]}-$i"; done
  fi
}

# Runs commands, all at the same time; the code is one that is not 0, if there is any. Processes wait for each other at
# the start, so one slice after the other would wait for ever.
together() {
  local job code=0 jobs=()
  local -n lines=$1
  set -m # a process group for each: gcloud's own children are ended with it
  for job in "${!lines[@]}"; do
    if [ -n "$dry_run" ]; then
      echo "${lines[job]}"
    else
      bash -c "exec ${lines[job]}" </dev/null &
      jobs+=("$!")
    fi
  done
  set +m
  [ "${#jobs[@]}" -gt 0 ] || return 0
  # shellcheck disable=SC2064 # these jobs, not later ones
  trap "kill -- ${jobs[*]/#/-} 2>/dev/null; exit 130" INT TERM
  for job in "${jobs[@]}"; do wait "$job" || code=$?; done
  trap - INT TERM
  return "$code"
}

# Runs a shell command on the hosts that --worker and --slice name; default: on all.
on_hosts() {
  local node names commands=()
  need NAME PROJECT ZONE SLICES WORKER SLICE
  names=$(nodes)
  for node in $names; do
    commands+=("$(quoted gcloud compute tpus tpu-vm ssh "$node" --project "${pod[PROJECT]}" --zone "${pod[ZONE]}" \
      --worker "${pod[WORKER]}" --quiet --command "$1")")
  done
  together commands
}

# The same for a script of this directory, from the checkout's root.
at_root() {
  on_hosts "cd $(quoted "${pod[DIRECTORY]}") && $(quoted "$@")"
}

queued() {
  local action=$1
  shift
  gcloud_line=(gcloud compute tpus queued-resources "$action" "${pod[NAME]}" --project "${pod[PROJECT]}"
    --zone "${pod[ZONE]}" "$@")
}

# How many chips an accelerator type has: of the older ones the name counts cores, two a chip.
chips() {
  local number=${pod[ACCELERATOR]##*-}
  case "${pod[ACCELERATOR]}" in
    v5litepod-* | v6e-*) echo $((number * pod[SLICES])) ;;
    *) echo $((number * pod[SLICES] / 2)) ;;
  esac
}

what() {
  echo "queued resource ${pod[NAME]} in ${pod[PROJECT]}, ${pod[ZONE]}: ${pod[SLICES]} × ${pod[ACCELERATOR]}," \
    "$(chips) chips, $(price)"
}

create() {
  local slices
  need NAME PROJECT ZONE ACCELERATOR RUNTIME SLICES SPOT
  confirm "creates $(what); it is paid for from the moment it is ACTIVE until '$0 delete'"
  if [ "${pod[SLICES]}" -eq 1 ]; then
    slices=(--node-id "${pod[NAME]}")
  else
    slices=(--node-count "${pod[SLICES]}" --node-prefix "${pod[NAME]}")
  fi
  [ "${pod[SPOT]}" = false ] || slices+=(--spot)
  [ -z "${pod[NETWORK]}" ] || slices+=(--network "${pod[NETWORK]}")
  queued create --accelerator-type "${pod[ACCELERATOR]}" --runtime-version "${pod[RUNTIME]}" "${slices[@]}" --quiet
  run "${gcloud_line[@]}"
  wait_for_it
}

wait_for_it() {
  local state last=""
  need NAME PROJECT ZONE POLL
  queued describe --format 'value(state.state)'
  if [ -n "$dry_run" ]; then
    quoted "${gcloud_line[@]}"
    return
  fi
  while :; do
    state=$("${gcloud_line[@]}") || fail "${pod[NAME]} cannot be looked up; it may still be asked for: $0 wait"
    [ "$state" = "$last" ] || printf '%(%H:%M:%S)T %s is %s\n' -1 "${pod[NAME]}" "$state"
    last=$state
    case "$state" in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        fail "${pod[NAME]} is $state and will not come: '$0 delete', then create it again; the reason:" \
          "gcloud compute tpus queued-resources describe ${pod[NAME]} --zone ${pod[ZONE]} --project ${pod[PROJECT]}"
        ;;
    esac
    sleep "${pod[POLL]}"
  done
}

install_all() {
  local here there shared=()
  need REPOSITORY REVISION DIRECTORY PYTHON
  if [ -n "${pod[SHARED_SOURCE]}" ]; then
    need SHARED
    shared=(--shared "${pod[SHARED]}" --shared-source "${pod[SHARED_SOURCE]}")
  fi
  here=$(quoted "${pod[DIRECTORY]}")
  there="{ [ -d $here/.git ] || $(quoted git clone --quiet "${pod[REPOSITORY]}" "${pod[DIRECTORY]}"); }"
  there+=" && cd $here && git fetch --quiet --tags origin"
  there+=" && $(quoted git checkout --quiet --detach "${pod[REVISION]}")"
  there+=" && $(quoted tpu_setup/host.sh install --python "${pod[PYTHON]}" "${shared[@]}")"
  on_hosts "$there"
  pod[CONFIG]="" # its dataset may not be there yet
  check
}

check() {
  local config=()
  need SLICES
  tell
  [ -z "${pod[CONFIG]}" ] || config=(--config "${pod[CONFIG]}" "${overrides[@]}")
  at_root .venv/bin/python tpu_setup/check_pod.py "${config[@]}"
}

copy() {
  local source=${words[1]:-} target=${words[2]:-} by size=("<files>" "<bytes>")
  [ -n "$target" ] || die "copy needs a source and a target, as in: $0 copy runs/mine/dataset /mnt/shared/dataset"
  [[ $target = /* ]] || die "the target $target must be an absolute path, the same on every host"
  [ -e "$source" ] || [[ $source = gs://* ]] || die "there is no $source"
  [ -n "$dry_run" ] || read -r -a size < <("${BASH_SOURCE[0]%/*}/host.sh" count "$source")
  [ "${#size[@]}" -eq 2 ] || fail "$source cannot be counted"
  # One host writes for all: the disk is shared.
  if [ ! -f "$source" ] || [[ $target = "${pod[SHARED]:-none}"/* ]]; then pod[WORKER]=0 pod[SLICE]=0; fi
  if [ -f "$source" ]; then
    local node names commands=()
    need NAME PROJECT ZONE SLICES WORKER SLICE
    names=$(nodes)
    for node in $names; do
      commands+=("$(quoted gcloud compute tpus tpu-vm scp "$source" "$node:$target" --project "${pod[PROJECT]}" \
        --zone "${pod[ZONE]}" --worker "${pod[WORKER]}" --quiet)")
    done
    together commands
  else
    by=$source
    if [[ $source != gs://* ]]; then
      need BUCKET NAME
      by=${pod[BUCKET]%/}/${pod[NAME]}/${target#/}
      run gcloud storage rsync --recursive "${source%/}" "$by"
    fi
    on_hosts "mkdir -p $(quoted "$target") && $(quoted gcloud storage rsync --recursive "${by%/}" "$target")"
  fi
  pod[WORKER]=all pod[SLICE]=all
  at_root tpu_setup/host.sh compare "$target" "${size[@]}"
}

start() {
  need CONFIG WORKDIR RESTARTS SLICES
  tell
  at_root tpu_setup/host.sh "$1" --workdir "${pod[WORKDIR]}" --restarts "${pod[RESTARTS]}" -- \
    .venv/bin/supermoe train --config "${pod[CONFIG]}" --workdir "${pod[WORKDIR]}" "${overrides[@]}"
}

delete() {
  need NAME PROJECT ZONE ACCELERATOR SLICES SPOT
  confirm "deletes $(what), and all that is on the disks of their hosts; the shared disk and the bucket stay, and are" \
    "paid for on"
  queued delete --force --quiet
  run "${gcloud_line[@]}"
}

case "$verb" in
  create) create ;;
  wait) wait_for_it ;;
  install) install_all ;;
  check) check ;;
  copy) copy ;;
  launch) start start ;;
  resume) start resume ;;
  logs)
    need WORKDIR
    at_root tpu_setup/host.sh logs --workdir "${pod[WORKDIR]}" --lines "${pod[LINES]}"
    ;;
  health | stop)
    need WORKDIR
    at_root tpu_setup/host.sh "$verb" --workdir "${pod[WORKDIR]}"
    ;;
  ssh)
    [ "${#rest[@]}" -gt 0 ] || die "there is no command; it goes behind --"
    on_hosts "${rest[*]}"
    ;;
  delete) delete ;;
  *) die "unknown verb $verb; see $0 --help" ;;
esac
