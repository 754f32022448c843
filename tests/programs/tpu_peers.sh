#!/usr/bin/env bash
# Compiles pr1_jax and Tunix for TPUs that are not there, on Qwen3-4B, and prices both by
# the compiler's own schedule (python -m pr1_jax.plan --schedule), one after the other:
#
#   bash tests/programs/tpu_peers.sh                all of it, hours on two cores; the
#                                                   table is tests/programs/results/tpu_peers.md
#   TOPOLOGIES=v5e:4x4 bash tests/programs/tpu_peers.sh
#   REDO=ours bash tests/programs/tpu_peers.sh      what is ours anew, the rest as it is kept
#
#   TOPOLOGIES  of "v5e:4x4 v6e:4x4 v5p:2x2x2"
#   WORKS       of "ours:decode ours:decode_blocks ours:update tunix:decode tunix:update
#               tunix:update_once tunix:update_tp2 tunix:update_tp1 tunix:update_packed"
#   LAYERS      full: all 36; else updates of 2 and 4, from which 36 are extrapolated
#   REDO        a word: results whose name has it are made again
#   OUT         folder of tpu_peers.md and tpu_peers.json
#   LIMIT_SEC   what a compile may take; one that fails does not stop the others
#
# The environment, logs and the price of each program are kept in build/tpu_peers, so that a
# run that was stopped goes on where it was. What is kept is of the code of then: REDO.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source-path=SCRIPTDIR/../..
source launch/env.sh

kept=build/tpu_peers
workers=tests/programs/tpu_peers
all=(ours:decode ours:decode_blocks ours:update tunix:decode tunix:update
  tunix:update_once tunix:update_tp2 tunix:update_tp1 tunix:update_packed)
read -ra topologies <<<"${TOPOLOGIES:-v5e:4x4 v6e:4x4 v5p:2x2x2}"
read -ra works <<<"${WORKS:-${all[*]}}"
limit_sec=${LIMIT_SEC:-3600}
for work in "${works[@]}"; do
  if [[ " ${all[*]} " != *" $work "* ]]; then
    echo "WORKS: $work is not one of ${all[*]}" >&2
    exit 2
  fi
done

unset XLA_FLAGS LIBTPU_INIT_ARGS JAX_COMPILATION_CACHE_DIR
export JAX_PLATFORMS=cpu PYTHONPATH=$PWD TPU_SKIP_MDS_QUERY=1 TPU_MIN_LOG_LEVEL=3
export TPU_WORKER_HOSTNAMES=localhost TPU_WORKER_ID=0 ALLOW_MULTIPLE_LIBTPU_LOAD=1

VENV=$kept/.venv
make_venv
install "$workers/requirements.txt"
install_package

# Prices one program. Where it fails, its log stays and no result.
price() { # topology peer:work layers
  local peer=${2%%:*} work=${2#*:} status=0 began=$SECONDS
  local name=$kept/prices/${1//:/-}/$peer-$work-$3
  [[ -z ${REDO:-} || $name != *"$REDO"* ]] || rm -f "$name.json"
  [[ ! -f $name.json ]] || return 0
  mkdir -p "$(dirname "$name")"
  timeout --foreground --kill-after=30 "$limit_sec" "$VENV/bin/python" \
    -m "tests.programs.tpu_peers.$peer" --topology "$1" --work "$work" \
    --layers "$3" --out "$name.json" >"$name.log" 2>&1 || status=$?
  if ((status)); then
    echo "exit status $status after $((SECONDS - began)) s" >>"$name.log"
    echo "$1, $peer, $work, $3 layers: failed, see $name.log" >&2
  else
    echo "$1, $peer, $work, $3 layers: $((SECONDS - began)) s"
  fi
}

trap 'exit 130' INT
for topology in "${topologies[@]}"; do
  for work in "${works[@]}"; do
    # Weights and caches of few layers stay on the chip between decode steps.
    depths=(2 4)
    [[ $work != *decode* && ${LAYERS:-} != full ]] || depths=(36)
    for layers in "${depths[@]}"; do price "$topology" "$work" "$layers"; done
  done
done
"$VENV/bin/python" -m tests.programs.tpu_peers.table "$kept/prices" \
  --out "${OUT:-tests/programs/results}"
