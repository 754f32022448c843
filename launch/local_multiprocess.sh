#!/usr/bin/env bash
# Runs a job as several processes on this machine, as a pod would run it on several:
#
#   bash launch/local_multiprocess.sh 2 --config=configs/rl_alternating.py:smoke
#   DEVICES=4 bash launch/local_multiprocess.sh 2 --config=… --config.mesh.fsdp=2
#
#   DEVICES   virtual CPU devices of each process; 1. On GPUs each process gets one GPU.
#
# Process 0 writes to the terminal, the others to build/local_multiprocess/process-I.log.
# When one ends with an error, the others are told to stop, and its exit code is this
# one's. The same command goes on where the job stopped, with any number of processes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR/..
source launch/env.sh

count=${1:-}
if [[ ! $count =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: bash launch/local_multiprocess.sh N --config=… (N processes)" >&2
  exit 2
fi
shift
make_venv
install_package

logs=build/local_multiprocess
mkdir -p "$logs"
port=$("$VENV/bin/python" -c 'import socket
s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
if [[ $JAX_PLATFORMS == cpu ]]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}"
fi

pids=()
# shellcheck disable=SC2317,SC2329  # called by the trap
stop() { ((${#pids[@]} == 0)) || kill "${pids[@]}" 2>/dev/null || true; }
trap stop EXIT
trap 'exit 130' INT TERM
for ((i = 0; i < count; i++)); do
  command=("$VENV/bin/python" -m pr1_jax.main "$@"
    "--coordinator=localhost:$port" "--num_processes=$count" "--process_id=$i")
  if [[ $JAX_PLATFORMS != cpu ]]; then
    export CUDA_VISIBLE_DEVICES=$i
  fi
  if ((i == 0)); then
    "${command[@]}" &
  else
    "${command[@]}" >"$logs/process-$i.log" 2>&1 &
  fi
  pids+=($!)
done

status=0
for ((done_ = 0; done_ < count; done_++)); do
  code=0
  wait -n -p ended "${pids[@]}" || code=$?
  for i in "${!pids[@]}"; do
    if [[ ${pids[i]} == "$ended" ]]; then
      if ((code != 0)); then
        echo "process $i of $count ended with exit code $code" >&2
        ((i == 0)) || tail -n 5 "$logs/process-$i.log" >&2
        status=$((status ? status : code))
      fi
      unset 'pids[i]'
    fi
  done
done
exit "$status"
