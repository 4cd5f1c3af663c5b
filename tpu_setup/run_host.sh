#!/usr/bin/env bash
# Runs a command on this host, and runs it again when it ends with a code that asks for it.
#
#   tpu_setup/run_host.sh [--restarts N] [--wait SECONDS] [--log FILE] [--pid FILE] -- COMMAND…
#
#   --restarts N     so many restarts in a row without progress, then it gives up; default: 10. Progress is a newer
#                    checkpoint in the --workdir that COMMAND names; without one no restart makes progress.
#   --wait SECONDS   before the first restart, doubled before each further one without progress up to 120; default: 30.
#                    The other hosts notice after 20 seconds that this one's process is gone: come back later than that.
#   --log FILE       appends everything that is said here, and what COMMAND says, to FILE
#   --pid FILE       holds the number of this process while it runs; refuses to be the second one
#   --dry-run        prints COMMAND, and does nothing
#
# COMMAND ends with        and then
#   0                      this ends, with 0
#   75                     COMMAND is started again: nothing is wrong with the run
#   a signal, as SIGKILL   COMMAND is started again
#   any other code         this ends with it: an error that would come again. SIGINT and SIGTERM (130, 143) belong here
#
# SIGTERM and SIGINT are passed on to COMMAND, which saves the run. This waits for it, and ends with its code.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

parse "$@" <<'DEFAULTS'
RESTARTS=10
WAIT=30
LOG=
PID=
DEFAULTS
command=("${rest[@]}")
[ "${#words[@]}" -eq 0 ] || die "unexpected ${words[0]}; the command goes behind --"
[ "${#command[@]}" -gt 0 ] || die "there is no command; it goes behind --, as in: $0 -- .venv/bin/supermoe train …"
need RESTARTS WAIT
if [ -n "$dry_run" ]; then
  quoted "${command[@]}"
  exit 0
fi

say() {
  printf 'run_host: %(%Y-%m-%dT%H:%M:%S%z)T %s: %s\n' -1 "$host" "$*" >&2 || true # a full disk must not end this
}

if [ -n "${pod[LOG]}" ]; then
  { mkdir -p "$(dirname "${pod[LOG]}")" && : >>"${pod[LOG]}"; } || die "--log ${pod[LOG]} cannot be written"
  exec >>"${pod[LOG]}" 2>&1
fi
if [ -n "${pod[PID]}" ]; then
  if other=$(running "${pod[PID]}"); then fail "${pod[PID]} says that process $other does this already"; fi
  mkdir -p "$(dirname "${pod[PID]}")"
  echo "$$" >"${pod[PID]}"
  trap 'rm -f "${pod[PID]}"' EXIT
fi

workdir=""
for ((i = 0; i < ${#command[@]}; i++)); do
  case "${command[i]}" in
    --workdir) workdir=${command[i + 1]:-} ;;
    --workdir=*) workdir=${command[i]#*=} ;;
  esac
done

# The step of the newest checkpoint, or -1.
newest() {
  local path best=-1
  for path in "$workdir"/checkpoints/*/; do
    path=${path%/} path=${path##*/}
    if [ -n "$workdir" ] && [[ $path =~ ^[0-9]+$ ]] && ((10#$path > best)); then best=$((10#$path)); fi
  done
  echo "$best"
}

child="" stopped="" interrupted=""
# shellcheck disable=SC2329 # the traps call it
forward() {
  stopped=$1 interrupted=1
  [ -z "$child" ] || kill -s "$1" "$child" 2>/dev/null || true
}
trap 'forward TERM' TERM
trap 'forward INT' INT

# Runs a command and waits for it; leaves its code in `code`.
await() {
  local next
  "$@" </dev/null &
  child=$! code=""
  [ -z "$stopped" ] || kill -s "$stopped" "$child" 2>/dev/null || true # it came in between
  while :; do
    interrupted="" next=0
    wait "$child" || next=$?
    # 127: its end was seen before, and a signal came between that and here.
    if [ "$next" -ne 127 ] || [ -z "$code" ]; then code=$next; fi
    [ -n "$interrupted" ] || break
  done
  child=""
}

# Each command gets a process group: a terminal's Ctrl-C comes here alone, and the command is not told to ignore it, as
# one in the background otherwise is.
set -m

ended=75 without=0 wait=${pod[WAIT]}
for ((start = 1; ; start++)); do
  [ -z "$stopped" ] || break
  before=$(newest)
  say "start $start: $(quoted "${command[@]}")"
  await "${command[@]}"
  ended=$code
  say "end $start: code $ended"
  [ -z "$stopped" ] || break
  case "$ended" in
    75) ;;
    130 | 143) break ;; # SIGINT, SIGTERM
    *) ((ended > 128 && ended <= 192)) || break ;;
  esac
  if (($(newest) > before)); then without=0 wait=${pod[WAIT]}; fi
  if ((without >= pod[RESTARTS])); then
    say "no newer checkpoint after $without restarts in a row: giving up"
    break
  fi
  without=$((without + 1))
  say "starts again in $wait s (without progress: restart $without of at most ${pod[RESTARTS]})"
  await sleep "$wait"
  wait=$((wait * 2 < 120 ? wait * 2 : 120))
done
[ -z "$stopped" ] || say "SIG$stopped: no restart"
exit "$ended"
