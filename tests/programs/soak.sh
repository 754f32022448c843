#!/usr/bin/env bash
# Kills a short real job at random moments until it has come to its end, and compares
# what it leaves with a job that was never killed:
#
#   bash tests/programs/soak.sh               50 kills; the table is build/soak/table.md
#   KILLS=5 SEED=1 bash tests/programs/soak.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source-path=SCRIPTDIR/../..
source launch/env.sh

make_venv
install_package "[test]"
JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} "$VENV/bin/python" -m tests.programs.soak \
  --kills="${KILLS:-50}" --seed="${SEED:-0}" --out=build/soak
