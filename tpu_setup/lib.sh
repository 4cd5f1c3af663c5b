# shellcheck shell=bash
# What the scripts here share; it is sourced, never run.

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
  echo "bash 4.4 or newer is needed, this is $BASH_VERSION (macOS: brew install bash)" >&2
  exit 2
}

shopt -s inherit_errexit # an error in $(…) is one here

# shellcheck disable=SC2034 # the scripts use it
host=$(uname -n) # HOSTNAME may be another machine's, passed on by SLURM

dry_run="" yes=""
words=() rest=() overrides=()
declare -A pod=() flags=()

# Prints the comment at the head of the script that runs.
usage() {
  awk 'NR == 1 || /^#SBATCH/ { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$0"
}

# Ends the script: it was used wrongly.
die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

# Ends the script: it was used well, and something else is wrong.
fail() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

# Prints words so that a shell reads them back as the same words.
quoted() {
  local word out="" quote="'\\''"
  for word in "$@"; do
    case "$word" in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//"'"/"$quote"}'" ;;
    esac
    out+="${out:+ }$word"
  done
  printf '%s\n' "$out"
}

# Runs a command, or prints it with --dry-run.
run() {
  if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}

# Fills `pod` with settings, and `words` and `rest` with other arguments. Flags go before the file of --pod, that goes
# before the defaults: lines KEY=VALUE on the standard input, which also say which settings there are.
parse() {
  local key line
  while IFS= read -r line; do
    pod[${line%%=*}]=${line#*=}
  done
  while [ $# -gt 0 ]; do
    case "$1" in
      --help | -h)
        usage
        exit 0
        ;;
      --dry-run) dry_run=1 ;;
      --yes) yes=1 ;;
      --)
        rest=("${@:2}")
        break
        ;;
      --*=*)
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
        continue
        ;;
      --*)
        key=${1#--} key=${key//-/_} key=${key^^}
        [ "$key" = POD ] || [ -n "${pod[$key]+known}" ] || die "unknown option $1; see $0 --help"
        [ $# -ge 2 ] || die "$1 needs a value"
        flags[$key]=$2
        shift
        ;;
      *) words+=("$1") ;;
    esac
    shift
  done
  [ -z "${flags[POD]:-}" ] || read_pod "${flags[POD]}"
  for key in "${!flags[@]}"; do pod[$key]=${flags[$key]}; done
}

# Reads settings from a file; it is not run, so that it can do no harm.
read_pod() {
  local line key value number=0
  [ -r "$1" ] || die "--pod $1 cannot be read; copy tpu_setup/pod.env.example and fill it in"
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    case "$line" in '' | '#'*) continue ;; esac
    key=${line%%=*} value=${line#*=}
    [ "$key" != "$line" ] || die "$1, line $number: $line is not KEY=VALUE"
    [ -n "${pod[$key]+known}" ] || [[ " $known_settings " = *" $key "* ]] ||
      die "$1, line $number: there is no setting $key; tpu_setup/pod.env.example names all"
    case "$value" in \"*\" | \'*\') value=${value:1:${#value}-2} ;; esac
    [ -z "$value" ] || pod[$key]=$value
  done <"$1"
}

# All settings that a file may hold: one file serves pod.sh and gke.sh, and neither reads all of it.
known_settings="NAME PROJECT ZONE SPOT SLICES SHARED CONFIG WORKDIR RESTARTS ACCELERATOR RUNTIME NETWORK REPOSITORY \
REVISION DIRECTORY PYTHON SHARED_SOURCE BUCKET POLL CLUSTER LOCATION MACHINE TOPOLOGY IMAGE CLAIM"

# Makes sure that settings are given, and say something that can be.
need() {
  local key value form
  for key in "$@"; do
    value=${pod[$key]:-}
    [ -n "$value" ] || die "$key is not set; give $(flag "$key") or a line $key=… in the file of --pod"
    case "$key" in
      NAME) form='^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$' ;;
      ZONE) form='^[a-z]+-[a-z]+[0-9]+-[a-z]$' ;;
      ACCELERATOR) form='^(v2|v3|v4|v5p|v5litepod|v6e)-[0-9]+$' ;;
      MACHINE) form='^ct(4p|5lp|5p)-hightpu-[148]t$|^ct6e-standard-[148]t$' ;;
      TOPOLOGY) form='^[0-9]+x[0-9]+(x[0-9]+)?$' ;;
      SLICES) form='^[1-9][0-9]*$' ;;
      RESTARTS | REQUEUES | POLL | LINES | WAIT | SECONDS) form='^[0-9]+$' ;;
      SPOT | CHECK) form='^(true|false)$' ;;
      WORKER | SLICE) form='^(all|[0-9]+)$' ;;
      SHARED | WORKDIR) form='^/[-A-Za-z0-9._/]+$' ;;
      BUCKET) form='^gs://[^/]' ;;
      IMAGE | CLAIM | CLUSTER | LOCATION | PROJECT) form='^[A-Za-z0-9][-A-Za-z0-9._/:@]*$' ;;
      REVISION) form='^[A-Za-z0-9][-A-Za-z0-9._/]*$' ;;
      *) form='' ;;
    esac
    [[ $value =~ $form ]] || die "$(flag "$key") $value is not of the form $form"
  done
}

flag() {
  local name=${1,,}
  printf -- '--%s' "${name//_/-}"
}

# Says what costs money, and goes no further without --yes.
confirm() {
  printf '%s\n' "$*" >&2
  [ -n "$yes" ] || [ -n "$dry_run" ] || die "nothing was done; add --yes if that is what you want"
}

# Puts into `overrides` what a run is told beside its config: the number of slices, and what stands behind --.
tell() {
  overrides=()
  [ "${pod[SLICES]}" -eq 1 ] || overrides=("--config.train.mesh.slices=${pod[SLICES]}")
  overrides+=("${rest[@]}")
}

# How the machines are paid for, in words.
price() {
  if [ "${pod[SPOT]}" = true ]; then echo "spot, which can be taken back at any time"; else echo "on demand"; fi
}

# Whether the run_host.sh lives whose number a file holds; prints that number.
running() {
  local number
  number=$(cat "$1" 2>/dev/null) && [[ $number =~ ^[0-9]+$ ]] || return 1
  # The number may have gone to another process since.
  { cat "/proc/$number/cmdline" || ps -o args= -p "$number"; } 2>/dev/null | grep -qaF run_host.sh || return 1
  echo "$number"
}
