#!/usr/bin/env bash
# Brings a run onto TPU slices of a GKE cluster, as a JobSet.
#
#   tpu_setup/gke.sh VERB [--pod FILE] [--SETTING VALUE …] [--dry-run] [--yes] [-- ARGUMENT…]
#
#   create     makes a node pool for each slice in CLUSTER, and the login for kubectl; costs money: needs --yes
#   render     prints tpu_setup/jobset.yaml with the settings filled in, as launch uses it; `render resume`: as resume
#   launch     starts `supermoe train --config CONFIG --workdir WORKDIR ARGUMENT…` on every host; restarted when it ends
#              with code 75, or when a node is lost, RESTARTS times. In a directory that was begun it goes on. Of
#              several slices it is told by --config.train.mesh.slices
#   resume     the same, and an error where nothing was begun
#   logs       follows the log of every host, or of --worker I of --slice J
#   health     the JobSet and its pods; of each slice's first host: how far is the run, chips, free disk
#   stop       deletes the JobSet: every pod gets SIGTERM, saves the run and ends. Dataset and run directory stay
#   delete     deletes the JobSet and the node pools: needs --yes
#
# Settings stand in FILE as lines KEY=VALUE, or are flags; a flag goes before the file. tpu_setup/pod.env.example names
# and explains all. --dry-run prints the commands, one a line, and runs none of them.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

parse "$@" <<'DEFAULTS'
NAME=
PROJECT=
ZONE=
SPOT=false
SLICES=1
CLUSTER=
LOCATION=
MACHINE=
TOPOLOGY=
IMAGE=
CLAIM=
SHARED=/mnt/shared
CONFIG=
WORKDIR=
RESTARTS=10
WORKER=all
SLICE=all
LINES=50
DEFAULTS
verb=${words[0]:-}
[ -n "$verb" ] || die "which verb? see $0 --help"
[ "$verb ${words[1]:-}" = "render resume" ] || [ "$verb ${words[1]:-}" = "render launch" ] ||
  [ "${#words[@]}" -eq 1 ] || die "unexpected ${words[1]}; what is for supermoe train goes behind --"

# Works out what machine and topology say: chips of a host, hosts of a slice.
shape() {
  local side
  need MACHINE TOPOLOGY SLICES
  pod[CHIPS]=${pod[MACHINE]##*-} pod[CHIPS]=${pod[CHIPS]%t}
  case "${pod[MACHINE]}" in
    ct4p-*) pod[TPU]=tpu-v4-podslice ;;
    ct5lp-*) pod[TPU]=tpu-v5-lite-podslice ;;
    ct5p-*) pod[TPU]=tpu-v5p-slice ;;
    ct6e-*) pod[TPU]=tpu-v6e-slice ;;
  esac
  pod[OF_SLICE]=1
  for side in ${pod[TOPOLOGY]//x/ }; do pod[OF_SLICE]=$((pod[OF_SLICE] * side)); done
  pod[HOSTS]=$((pod[OF_SLICE] / pod[CHIPS]))
  [ $((pod[HOSTS] * pod[CHIPS])) -eq "${pod[OF_SLICE]}" ] && [ "${pod[HOSTS]}" -gt 0 ] ||
    die "--topology ${pod[TOPOLOGY]} has ${pod[OF_SLICE]} chips, no multiple of the ${pod[CHIPS]} of a" \
      "--machine ${pod[MACHINE]}"
}

# Always the cluster of the settings, whichever kubectl was last told of.
kube() {
  need PROJECT LOCATION CLUSTER
  kubectl_line=(kubectl --context "gke_${pod[PROJECT]}_${pod[LOCATION]}_${pod[CLUSTER]}" "$@")
}

# A string of YAML, which is one of JSON, too.
text() {
  local value=${1//\\/\\\\}
  [[ $1 != *[[:cntrl:]]* ]] || die "$1 holds a line break or another control character"
  printf '"%s"' "${value//'"'/'\"'}"
}

# The template with its settings; $1: launch or resume.
render() {
  local line key begin=() command=() word
  need NAME RESTARTS SLICES SHARED CONFIG WORKDIR IMAGE CLAIM
  shape
  tell
  command=(supermoe train --config "${pod[CONFIG]}" --workdir "${pod[WORKDIR]}" "${overrides[@]}")
  if [ "$1" = resume ]; then
    # shellcheck disable=SC2016 # the pod's shell expands it
    begin=(bash -c 'test -e "$0/config.json" || { echo "$0 holds no run that was begun" >&2; exit 2; }; exec "$@"'
      "${pod[WORKDIR]}")
  fi
  while IFS= read -r line; do
    if [[ $line = *@COMMAND@* ]]; then
      for word in "${begin[@]}" "${command[@]}"; do
        word=$(text "$word")
        printf '%s%s\n' "${line%@COMMAND@*}" "$word"
      done
      continue
    fi
    while [[ $line =~ @([A-Z_]+)@ ]]; do
      key=${BASH_REMATCH[1]}
      [ -n "${pod[$key]:-}" ] || fail "jobset.yaml asks for $key, which is not set"
      line=${line//"@$key@"/"${pod[$key]}"}
    done
    printf '%s\n' "$line"
  done <"$(dirname "${BASH_SOURCE[0]}")/jobset.yaml"
}

pools() {
  local i
  for ((i = 0; i < pod[SLICES]; i++)); do echo "${pod[NAME]}-$i"; done
}

what() {
  echo "${pod[SLICES]} node pool(s) in ${pod[CLUSTER]}, ${pod[PROJECT]}, ${pod[ZONE]}: each ${pod[HOSTS]} ×" \
    "${pod[MACHINE]}, together $((pod[OF_SLICE] * pod[SLICES])) chips, $(price)"
}

create() {
  local pool names options=()
  need NAME PROJECT ZONE LOCATION CLUSTER SPOT
  shape
  confirm "creates $(what); they are paid for until '$0 delete'"
  # A slice of one host has no topology to ask for: GKE refuses the flag.
  [ "${pod[HOSTS]}" -eq 1 ] || options+=(--tpu-topology "${pod[TOPOLOGY]}")
  [ "${pod[SPOT]}" = false ] || options+=(--spot)
  names=$(pools)
  for pool in $names; do
    run gcloud container node-pools create "$pool" --cluster "${pod[CLUSTER]}" --location "${pod[LOCATION]}" \
      --project "${pod[PROJECT]}" --node-locations "${pod[ZONE]}" --machine-type "${pod[MACHINE]}" \
      --num-nodes "${pod[HOSTS]}" "${options[@]}" --quiet
  done
  run gcloud container clusters get-credentials "${pod[CLUSTER]}" --location "${pod[LOCATION]}" \
    --project "${pod[PROJECT]}"
}

launch() {
  local manifest
  manifest=$(render "$1") # before anything is done: a setting may be missing
  # A JobSet that has ended is in the way, and one that runs would be trained beside.
  if [ "$1" = resume ]; then
    kube delete jobset "${pod[NAME]}" --ignore-not-found --wait
    run "${kubectl_line[@]}"
  fi
  kube create --filename -
  if [ -n "$dry_run" ]; then
    local key line=(tpu_setup/gke.sh render "$1")
    for key in $(printf '%s\n' "${!flags[@]}" | sort); do line+=("$(flag "$key")" "${flags[$key]}"); done
    [ "${#rest[@]}" -eq 0 ] || line+=(-- "${rest[@]}")
    echo "$(quoted "${line[@]}") | $(quoted "${kubectl_line[@]}")"
  else
    printf '%s\n' "$manifest" | "${kubectl_line[@]}"
  fi
}

logs() {
  local label="jobset.sigs.k8s.io/jobset-name=${pod[NAME]}"
  need NAME WORKER SLICE LINES
  shape
  [ "${pod[SLICE]}" = all ] || label+=",jobset.sigs.k8s.io/job-index=${pod[SLICE]}"
  [ "${pod[WORKER]}" = all ] || label+=",batch.kubernetes.io/job-completion-index=${pod[WORKER]}"
  kube logs --selector "$label" --container train --prefix --follow --tail "${pod[LINES]}" \
    --max-log-requests "$((pod[HOSTS] * pod[SLICES]))"
  run "${kubectl_line[@]}"
}

health() {
  local i code=0
  need NAME WORKDIR SLICES
  kube get jobset "${pod[NAME]}"
  run "${kubectl_line[@]}"
  kube get pods --selector "jobset.sigs.k8s.io/jobset-name=${pod[NAME]}" --output wide
  run "${kubectl_line[@]}"
  for ((i = 0; i < pod[SLICES]; i++)); do
    kube exec "job/${pod[NAME]}-slice-$i" --container train -- tpu_setup/host.sh health --workdir "${pod[WORKDIR]}" \
      --process 1
    run "${kubectl_line[@]}" || code=1
  done
  return "$code"
}

stop() {
  need NAME
  kube delete jobset "${pod[NAME]}" --ignore-not-found --wait
  run "${kubectl_line[@]}"
}

delete() {
  local pool names
  need NAME PROJECT ZONE LOCATION CLUSTER SPOT
  shape
  confirm "deletes the JobSet ${pod[NAME]} and $(what); the cluster and the shared volume stay, and are paid for on"
  stop
  names=$(pools)
  for pool in $names; do
    run gcloud container node-pools delete "$pool" --cluster "${pod[CLUSTER]}" --location "${pod[LOCATION]}" \
      --project "${pod[PROJECT]}" --quiet
  done
}

case "$verb" in
  create) create ;;
  render) render "${words[1]:-launch}" ;;
  launch) launch launch ;;
  resume) launch resume ;;
  logs) logs ;;
  health) health ;;
  stop) stop ;;
  delete) delete ;;
  *) die "unknown verb $verb; see $0 --help" ;;
esac
