#!/usr/bin/env bash
# Times pr1_jax beside Tunix and TRL on CPU, one process at a time:
#
#   bash tests/programs/peers.sh            all of it; the table is tests/programs/results/peers.md
#   SMALL=1 bash tests/programs/peers.sh    tiny shapes, once: does everything run?
#   WORKS="update step" PEERS="ours trl" ROUNDS=5 OUT=build/again bash tests/programs/peers.sh
#
#   WORKS       of "sampling update step"
#   PEERS       of "ours tunix trl"; trl updates compiled, and also eagerly; those on JAX
#               with one device, and with a device a core (ours_devices, tunix_devices).
#               Peers update all sequences at once, as is their default, and also in
#               micro-batches as small as ours (tunix_micro, trl_micro, trl_eager_micro)
#   ROUNDS      times that all is run, in turn; 3
#   REPEATS     units of work that a process times after the first two; 5
#   OUT         folder of peers.md and peers.json
#   LIMIT_SEC   what a process may take; one that fails does not stop the others
#
# Environments, weights, logs and single results are kept in build/peers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source-path=SCRIPTDIR/../..
source launch/env.sh

kept=build/peers
workers=tests/programs/peers
read -ra works <<<"${WORKS:-sampling update step}"
read -ra peers <<<"${PEERS:-ours tunix trl}"
rounds=$kept/rounds-$(date +%Y%m%d-%H%M%S)
limit_sec=${LIMIT_SEC:-1800}
if [[ ${SMALL:-0} != 0 ]]; then
  weights=$kept/weights/tiny
  model=(--layers 2 --width 64)
  shapes=(--prompts 8 --prompt_tokens 8 --new_tokens 8)
  micro_batch=4
  num_rounds=${ROUNDS:-1} repeats=${REPEATS:-1} out=${OUT:-$rounds}
else
  weights=$kept/weights/small
  model=()
  shapes=()
  micro_batch=8 # as in the configs
  num_rounds=${ROUNDS:-3} repeats=${REPEATS:-5} out=${OUT:-tests/programs/results}
fi
for work in "${works[@]}"; do
  if [[ ! $work =~ ^(sampling|update|step)$ ]]; then
    echo "WORKS: $work is not one of sampling, update, step" >&2
    exit 2
  fi
done
for peer in "${peers[@]}"; do
  if [[ ! $peer =~ ^(ours|tunix|trl)$ ]]; then
    echo "PEERS: $peer is not one of ours, tunix, trl" >&2
    exit 2
  fi
done

# Not what the caller may have set for other runs: what compiles does so from scratch.
unset XLA_FLAGS JAX_COMPILATION_CACHE_DIR
devices=1 # a power of two, since these must divide sequences
while ((2 * devices <= $(nproc) && devices < 4)); do devices=$((2 * devices)); done
device_flags=--xla_force_host_platform_device_count=$devices
# With a device for each core, more threads would only wait for each other.
((devices < $(nproc))) || device_flags+=" --xla_cpu_multi_thread_eigen=false"
export JAX_PLATFORMS=cpu PYTHONPATH=$PWD
# Read when libraries are imported: torch compiles from scratch too, and asks no hub.
export TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 HF_HUB_OFFLINE=1

make_venv
install_package
"$VENV/bin/python" -m pr1_jax.kernels.cpu.library # compiled as the peers' wheels are
declare -A python=([ours]=$VENV/bin/python)
export PYTHON=$VENV/bin/python # the peers get the same one
for peer in "${peers[@]}"; do
  if [[ $peer != ours ]]; then
    VENV=$kept/.venv-$peer
    make_venv
    install "$workers/requirements-$peer.txt"
    python[$peer]=$VENV/bin/python
  fi
done
if [[ ! -d $weights ]]; then
  "${python[ours]}" "$workers/make_weights.py" "$weights" "${model[@]}"
fi

# Runs one process. Where it fails, its log stays and no result.
run_worker() { # round work row
  local peer=${3%%_*} name=$rounds/round$1/$2-$3 status=0 began=$SECONDS xla_flags=
  local flags=(--weights "$weights" --work "$2" --repeats "$repeats" "${shapes[@]}")
  case $3 in
    *_eager | *_eager_*) flags+=(--no-compile) ;;
    *_devices) xla_flags=$device_flags ;;
  esac
  [[ $3 != *_micro && $peer != ours ]] || flags+=(--micro_batch "$micro_batch")
  mkdir -p "$rounds/round$1"
  # In the foreground, or an interrupt would not reach it.
  XLA_FLAGS=$xla_flags timeout --foreground --kill-after=30 "$limit_sec" \
    "${python[$peer]}" "$workers/${peer}_worker.py" "${flags[@]}" \
    --out "$name.json" >"$name.log" 2>&1 || status=$?
  if ((status)); then
    rm -f "$name.json"
    echo "exit status $status after $((SECONDS - began)) s" >>"$name.log"
    echo "round $1 of $num_rounds, $2, $3: failed, see $name.log" >&2
  else
    echo "round $1 of $num_rounds, $2, $3: $((SECONDS - began)) s"
  fi
}

trap 'exit 130' INT
for ((round = 1; round <= num_rounds; round++)); do
  for work in "${works[@]}"; do
    for peer in "${peers[@]}"; do
      rows=("$peer")
      case $peer-$work in
        trl-sampling) ;; # only what it trains is compiled
        trl-*) rows+=(trl_eager trl_micro trl_eager_micro) ;;
        tunix-sampling | ours-*) rows+=("${peer}_devices") ;;
        tunix-*) rows+=(tunix_devices tunix_micro) ;;
      esac
      for row in "${rows[@]}"; do run_worker "$round" "$work" "$row"; done
    done
  done
done
"${python[ours]}" -m tests.programs.peers.table "$rounds" --out "$out"
