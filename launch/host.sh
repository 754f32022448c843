#!/usr/bin/env bash
# What the scripts of this folder run on a host, in the checkout copied there.
#
#   host.sh setup tpu|gpu|cpu [STAMP]     makes .venv; STAMP tells which files
#   host.sh start FLAGS -- ARGUMENTS      python -m pr1_jax.main in the background,
#                                         unless it is running already
#   host.sh supervise FLAGS -- ARGUMENTS  the same in the foreground (containers, SLURM)
#   host.sh state                         state=none, running, finished, wrong, failed,
#                                         interrupted or stopped
#   host.sh tail                          follows the log until the job ends
#   host.sh stop [--grace-sec=300]        lets the job save, then ends it
#
#   --restarts=N      starts it again so often after a failure: 20; 0 in the foreground.
#                     A run of 10 minutes or more sets the count back.
#   --unless-stopped  start: not if `stop` was the last word
#   --backoff-sec=N   pause before the first restart, doubled up to 5 minutes: 10
#
# Exit code 0 means finished and 2 a wrong config; neither is started again. What
# was told to stop (SIGTERM) ends with 143 even if it saved and left with 0, or a
# scheduler would take it for finished. Log and state are ~/pr1_jax-HOST.*
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR/..
source launch/common.sh

files=$HOME/pr1_jax-$(uname -n) # homes may be shared
long_run_sec=600
max_backoff_sec=300

do_setup() {
  local accelerator=$1 stamp=$2
  [[ $accelerator =~ ^(tpu|gpu|cpu)$ ]] || fail "setup: $accelerator is not tpu, gpu or cpu"
  # shellcheck source-path=SCRIPTDIR/..
  source launch/env.sh
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1 &&
    ! find_python >/dev/null 2>&1; then
    # TPU VMs come with Python 3.10.
    echo "Getting Python 3.12 with uv"
    python3 -m pip install --quiet --user uv
    python3 -m uv python install --quiet 3.12
    PYTHON=$(python3 -m uv python find 3.12)
  fi
  make_venv
  install_package "$([[ $accelerator == cpu ]] || echo "[$accelerator]")"
  [[ -z $stamp ]] || echo "$stamp" >"$VENV/checkout"
}

# Runs the program until it need not run again; returns its exit code.
supervise() {
  local restarts=${FLAG[restarts]:-0} first_pause=${FLAG[backoff-sec]:-10}
  local python=.venv/bin/python child=0 signals=0 seen failures=0 status began pause
  [[ -x $python ]] || python=python3
  trap 'signals=$((signals + 1)); if ((child)); then kill -TERM "$child" || true; fi' TERM INT
  while true; do
    began=$SECONDS
    "$python" -m pr1_jax.main "${PROGRAM[@]}" &
    child=$!
    while true; do # a signal ends `wait` before the program has ended
      seen=$signals status=0
      wait "$child" || status=$?
      ((signals != seen)) || break
    done
    child=0
    if ((signals)); then
      echo "pr1_jax was told to stop; its exit code was $status"
      return 143
    elif ((status == 0 || status == 2)); then
      return "$status"
    fi
    ((SECONDS - began < long_run_sec)) || failures=0
    if ((failures >= restarts)); then
      return "$status"
    fi
    pause=$((first_pause * 2 ** (failures < 16 ? failures : 16)))
    pause=$((pause < max_backoff_sec ? pause : max_backoff_sec))
    failures=$((failures + 1))
    echo "pr1_jax ended with exit code $status: restart $failures of $restarts in $pause s"
    sleep "$pause" &
    child=$!
    wait "$child" || true
    child=0
    ((signals == 0)) || return 143
  done
}

# What a job is that ended before its time: `stop` leaves a mark before it acts, so
# that nobody who keeps the job alive mistakes its end for an accident.
end_state() {
  if [[ -e $files.stop ]]; then
    echo stopped
  else
    echo interrupted
  fi
}

# What `start` leaves in the background, with the lock as file 9.
do_job() {
  local status=0
  supervise || status=$?
  case $status in
    0) echo finished >"$files.state" ;;
    2) echo wrong >"$files.state" ;;
    143) end_state >"$files.state" ;;
    *) echo failed >"$files.state" ;;
  esac
  return "$status"
}

do_start() {
  local arguments
  arguments=$(quote "${PROGRAM[@]}")
  exec 9>>"$files.lock"
  if ! flock --timeout 0.2 9; then
    if [[ -f $files.args && $(<"$files.args") != "$arguments" ]]; then
      say "another job is running here: $(<"$files.args")"
      exit 1
    fi
    echo "already running on $(uname -n)"
    return
  fi
  if [[ -e $files.stop && -n ${FLAG[unless-stopped]:-} ]]; then
    echo "was stopped on $(uname -n)"
    return
  fi
  rm -f "$files.stop"
  printf '%s\n' "$arguments" >"$files.args"
  echo running >"$files.state"
  echo "$(date): $arguments" >>"$files.log"
  setsid bash launch/host.sh job --restarts="${FLAG[restarts]:-20}" \
    --backoff-sec="${FLAG[backoff-sec]:-10}" -- "${PROGRAM[@]}" \
    >>"$files.log" 2>&1 </dev/null 3>&1 &
  echo $! >"$files.pid"
  echo "started on $(uname -n), log in $files.log"
}

is_running() {
  [[ -f $files.lock ]] && ! flock --nonblock "$files.lock" true
}

do_state() {
  local state=none
  if is_running; then
    state=running
  elif [[ -f $files.state ]]; then
    state=$(<"$files.state")
    # Nobody was left to write down how it ended: the host went down.
    [[ $state != running ]] || state=$(end_state)
  fi
  echo "state=$state"
}

do_tail() {
  [[ -f $files.log ]] || fail "nothing was started here: $files.log is missing"
  tail --lines=100 --follow=name --retry --pid="$(<"$files.pid")" "$files.log"
  do_state
}

do_stop() {
  local pid
  touch "$files.stop"
  if is_running; then
    pid=$(<"$files.pid")
    kill -TERM "$pid" || true
    if ! flock --timeout "${FLAG[grace-sec]:-300}" "$files.lock" true; then
      say "still running after ${FLAG[grace-sec]:-300} s: killed"
      kill -KILL -- "-$pid" || true
      flock --timeout 30 "$files.lock" true
    fi
    echo "stopped on $(uname -n)"
  else
    echo "nothing is running on $(uname -n)"
  fi
  [[ $(do_state) == state=finished ]] || echo stopped >"$files.state"
}

if [[ ${1:-} == setup ]]; then
  do_setup "${2:-}" "${3:-}"
  exit
fi
parse "restarts backoff-sec grace-sec" "unless-stopped" "$@"
need_numbers restarts backoff-sec grace-sec
case $ACTION in
  start | job) "do_$ACTION" ;;
  supervise) supervise ;;
  state | tail | stop) "do_$ACTION" ;;
  *) fail "${ACTION:-an action} is not one of setup, start, supervise, state, tail, stop" ;;
esac
