#!/usr/bin/env bash
# Runs pr1_jax on a Cloud TPU VM slice, one process a host.
#
#   launch/tpu_vm.sh watch --name=pr1 --zone=us-west4-a --type=v5litepod-16 --spot \
#       -- --config=configs/rl_alternating.py:qwen3_4b --workdir=/mnt/shared/pr1
#
#   create    makes the slice, or waits until it is there; one that was preempted
#             is deleted and made again
#   install   copies the tracked files to all hosts and sets them up, if they changed
#   run       starts the job on all hosts, unless it is running
#   tail      follows the log of host 0 until the job ends; --worker=N another one
#   status    what the slice and the job are doing
#   stop      lets the job save its state, then ends it
#   delete    deletes the slice
#   all       create, install, run, tail
#   watch     create, install, run, and all that again after a preemption, until the
#             job has finished (exit code 0) or cannot (2: a wrong config, 1: failed)
#
#   --name, --zone, --project
#   --type          v5litepod-16, v5p-32, v6e-8 ...
#   --version       runtime of the VMs; by default the one that goes with --type
#   --spot          cheaper, may be preempted at any time
#   --queued        by a queued resource, which waits until there is capacity
#   --create-flags  more flags for gcloud's create, e.g. "--network=x --reserved"
#   --ssh-flags     more flags for gcloud's ssh and scp, e.g. "--internal-ip"
#   --restarts=20 --backoff-sec=10 --grace-sec=300   see launch/host.sh
#   --unless-stopped  run: not on hosts where `stop` was the last word
#   --poll-sec=60   pause between looks at the slice
#   --dry-run       prints every command and runs none
#
# Each action may be repeated: what is done already is left alone. Flags of
# pr1_jax.main go behind `--`; --distributed is added to them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR/..
source launch/common.sh

parse "name zone project type version create-flags ssh-flags restarts backoff-sec \
grace-sec poll-sec worker" "spot queued unless-stopped" "$@"
need_numbers restarts backoff-sec grace-sec

tpu() { # run|ask group verb arguments...
  "$1" gcloud compute tpus "${@:2}" --quiet --zone="${FLAG[zone]}" \
    ${FLAG[project]:+"--project=${FLAG[project]}"}
}

# Runs a command on one host or on all.
remote() { # run|ask worker command
  local flags
  read -ra flags <<<"${FLAG[ssh-flags]:-}"
  tpu "$1" tpu-vm ssh "${FLAG[name]}" --worker="$2" --command="$3" "${flags[@]}"
}

# Prints the state of the slice, of the request for it where it is queued and not
# granted, or ABSENT. An error that is not "no such thing" is one.
slice_state() {
  local state
  if [[ -n ${FLAG[queued]:-} ]]; then
    state=$(describe queued-resources "state.state")
    if [[ $state != ACTIVE ]]; then
      echo "$state"
      return
    fi
  fi
  state=$(describe tpu-vm state)
  if [[ $state == ABSENT && -n ${FLAG[queued]:-} ]]; then
    state=SUSPENDED # was granted once and taken away
  fi
  echo "$state"
}

describe() { # group field
  local state errors
  errors=$(mktemp)
  if state=$(tpu ask "$1" describe "${FLAG[name]}" --format="value($2)" 2>"$errors"); then
    echo "${state:-ABSENT}"
    rm "$errors"
  elif grep -qiE 'NOT_FOUND|not found' "$errors"; then
    echo ABSENT
    rm "$errors"
  else
    say "$(<"$errors")"
    rm "$errors"
    return 1
  fi
}

is_there() {
  local state
  state=$(slice_state) && [[ $state == READY ]]
}

states() { remote ask all "$(state_command)"; }

do_create() {
  local state
  need type
  while true; do
    state=$(slice_state)
    case $state in
      READY)
        say "${FLAG[name]} is there"
        return
        ;;
      ABSENT) make_slice ;;
      PREEMPTED | TERMINATED | FAILED | SUSPENDED)
        say "${FLAG[name]} is $state: deleting it to make it again"
        delete_slice
        continue
        ;;
      STOPPED) tpu run tpu-vm start "${FLAG[name]}" ;;
      *) say "${FLAG[name]} is $state: waiting" ;;
    esac
    ((DRY_RUN == 0)) || return 0
    [[ $state == STOPPED || ($state == ABSENT && -z ${FLAG[queued]:-}) ]] ||
      sleep "${FLAG[poll-sec]:-60}"
  done
}

make_slice() {
  local more version
  version=$(runtime_version)
  read -ra more <<<"${FLAG[create-flags]:-}"
  more=(--accelerator-type="${FLAG[type]}" ${FLAG[spot]:+--spot} "${more[@]}")
  if [[ -n ${FLAG[queued]:-} ]]; then
    tpu run queued-resources create "${FLAG[name]}" --node-id="${FLAG[name]}" \
      --runtime-version="$version" "${more[@]}"
  else
    tpu run tpu-vm create "${FLAG[name]}" --version="$version" "${more[@]}"
  fi
}

# https://cloud.google.com/tpu/docs/runtimes
runtime_version() {
  case ${FLAG[version]:-}/${FLAG[type]} in
    /v6e-*) echo v2-alpha-tpuv6e ;;
    /v5p-*) echo v2-alpha-tpuv5 ;;
    /v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    /v[234]-*) echo tpu-ubuntu2204-base ;;
    /*) fail "--version is missing: none is known for --type=${FLAG[type]}" ;;
    *) echo "${FLAG[version]}" ;;
  esac
}

delete_slice() {
  if [[ -n ${FLAG[queued]:-} ]]; then
    tpu run queued-resources delete "${FLAG[name]}" --force
  else
    tpu run tpu-vm delete "${FLAG[name]}"
  fi
}

do_delete() {
  local state
  if [[ -n ${FLAG[queued]:-} ]]; then
    state=$(describe queued-resources state.state)
  else
    state=$(describe tpu-vm state)
  fi
  if [[ $state == ABSENT && $DRY_RUN == 0 ]]; then
    say "${FLAG[name]} is not there"
  else
    delete_slice
  fi
}

do_install() {
  local flags
  read -ra flags <<<"${FLAG[ssh-flags]:-}"
  pack
  if is_installed "$(remote ask all "$(installed_command)")"; then
    say "this checkout is installed"
    return
  fi
  tpu run tpu-vm scp "$BUNDLE" "${FLAG[name]}:" --worker=all "${flags[@]}"
  remote run all "$(install_command tpu)"
}

do_run() {
  need_program
  remote run all "$(start_command --distributed "${PROGRAM[@]}")"
}

do_tail() { remote run "${FLAG[worker]:-0}" "bash pr1_jax/launch/host.sh tail"; }

do_status() {
  local state
  state=$(slice_state)
  report "slice: $state"
  if [[ $state == READY || $DRY_RUN == 1 ]]; then
    report "job: $(judge "$(states)")"
  fi
}

do_stop() { remote run all "$(stop_command)"; }

do_all() {
  do_create
  do_install
  do_run
  do_tail
}

do_watch() { watch create install run; }

case $ACTION in
  create | install | run | tail | status | stop | delete | all | watch) ;;
  *) fail "${ACTION:-an action} is not one of create, install, run, tail, status," \
    "stop, delete, all, watch" ;;
esac
need name zone
case $ACTION in
  all | watch)
    need type
    need_program
    ;;
esac
"do_$ACTION"
