#!/usr/bin/env bash
# Runs pr1_jax on hosts that one can reach by ssh, one process a host.
#
#   launch/ssh.sh watch --hosts=gpu1,gpu2 \
#       -- --config=configs/rl_alternating.py:qwen3_4b --workdir=/shared/pr1
#
#   install   copies the tracked files to all hosts and sets them up, if they changed
#   run       starts the job on all hosts, unless it is running
#   tail      follows the log of the first host until the job ends
#   status    what the job is doing, host by host
#   stop      lets the job save its state, then ends it
#   all       install, run, tail
#   watch     install, run, and that again where a host went down, until the job has
#             finished (exit code 0) or cannot (2: a wrong config, 1: failed)
#
#   --hosts         HOST,USER@HOST,...
#   --hosts-file    the same from a file, one a line, # for comments
#   --coordinator   HOST:PORT under which all reach the first host; by default its
#                   name in --hosts and port 8476
#   --accelerator   gpu, cpu or tpu; gpu
#   --shared-home   the hosts share the home folder: one installation is enough
#   --ssh-flags     more flags for ssh and scp, e.g. "-i key -o StrictHostKeyChecking=no"
#   --restarts=20 --backoff-sec=10 --grace-sec=300   see launch/host.sh
#   --unless-stopped  run: not on hosts where `stop` was the last word
#   --poll-sec=60   pause between looks at the hosts
#   --dry-run       prints every command and runs none
#
# Each action may be repeated: what is done already is left alone. Flags of
# pr1_jax.main go behind `--`; those that join the hosts are added to them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR/..
source launch/common.sh

parse "hosts hosts-file coordinator accelerator ssh-flags restarts backoff-sec grace-sec \
poll-sec" "shared-home unless-stopped" "$@"
need_numbers restarts backoff-sec grace-sec
read -ra ssh_flags <<<"-o BatchMode=yes -o ConnectTimeout=15 ${FLAG[ssh-flags]:-}"

hosts=()
read_hosts() {
  local host file=${FLAG[hosts-file]:-}
  if [[ -n $file ]]; then
    [[ -r $file ]] || fail "--hosts-file=$file cannot be read"
    mapfile -t hosts < <(sed 's/#.*//; s/[[:space:]]//g; /^$/d' "$file")
  else
    need hosts
    IFS=, read -ra hosts <<<"${FLAG[hosts]}"
  fi
  ((${#hosts[@]})) || fail "--hosts-file=$file names no host"
  for host in "${hosts[@]}"; do
    [[ $host =~ ^([a-zA-Z0-9._-]+@)?[a-zA-Z0-9_][a-zA-Z0-9._-]*$ && $host != -* ]] ||
      fail "--hosts: $(quote "$host") is no host"
  done
}

remote() { # run|ask host command
  "$1" ssh "${ssh_flags[@]}" "$2" "$3" </dev/null
}

# Calls a function for each host at the same time, since hosts save together; fails
# if one does. A dry run goes one by one, so that lines come in order.
at_once() { # function hosts...
  local each=$1 host pid pids=() status=0
  shift
  for host in "$@"; do
    if ((DRY_RUN)); then
      "$each" "$host"
    else
      "$each" "$host" &
      pids+=("$!")
    fi
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || status=1
  done
  return "$status"
}

host_state() { remote ask "$1" "$(state_command)" || echo state=unreachable; }
states() { at_once host_state "${hosts[@]}"; }
is_there() { true; } # a host that is down is unreachable, and then none or interrupted

install_host() {
  if is_installed "$(remote ask "$1" "$(installed_command)")"; then
    say "this checkout is installed on $1"
    return
  fi
  run scp "${ssh_flags[@]}" "$BUNDLE" "$1:"
  remote run "$1" "$(install_command "${FLAG[accelerator]:-gpu}")"
}

do_install() {
  pack
  if [[ -n ${FLAG[shared-home]:-} ]]; then
    install_host "${hosts[0]}"
  else
    at_once install_host "${hosts[@]}"
  fi
}

start_host() {
  local i id=0 coordinator=${FLAG[coordinator]:-${hosts[0]#*@}:8476}
  for i in "${!hosts[@]}"; do
    [[ ${hosts[i]} != "$1" ]] || id=$i
  done
  remote run "$1" "$(start_command --coordinator="$coordinator" \
    --num_processes="${#hosts[@]}" --process_id="$id" "${PROGRAM[@]}")"
}

do_run() {
  need_program
  at_once start_host "${hosts[@]}"
}

do_tail() { remote run "${hosts[0]}" "bash pr1_jax/launch/host.sh tail"; }

status_host() {
  local state
  state=$(host_state "$1")
  report "$1: ${state#state=}"
}
do_status() { at_once status_host "${hosts[@]}"; }

stop_host() { remote run "$1" "$(stop_command)"; }
do_stop() { at_once stop_host "${hosts[@]}"; }

do_all() {
  do_install
  do_run
  do_tail
}

do_watch() { watch install run; }

case $ACTION in
  install | run | tail | status | stop | all | watch) ;;
  *) fail "${ACTION:-an action} is not one of install, run, tail, status, stop, all, watch" ;;
esac
read_hosts
[[ ${FLAG[accelerator]:-gpu} =~ ^(gpu|cpu|tpu)$ ]] ||
  fail "--accelerator=${FLAG[accelerator]} is not gpu, cpu or tpu"
case $ACTION in
  all | watch) need_program ;;
esac
"do_$ACTION"
