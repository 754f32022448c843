#!/usr/bin/env bash
# Teaches a small model to think in parallel, from nothing, on a laptop.
#
#   bash launch/quickstart.sh
#   WORKDIR=runs/again bash launch/quickstart.sh --config.seed=1
#   CONFIG=configs/rl_alternating.py:smoke bash launch/quickstart.sh
#
# Run it again to go on after an interruption. Arguments go to pr1_jax.main.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR/..
source launch/env.sh

config=${CONFIG:-configs/rl_alternating.py}
workdir=${WORKDIR:-runs/quickstart}

make_venv
install_package
"$VENV/bin/python" -m pr1_jax.main --config="$config" --workdir="$workdir" "$@"

cat <<END

The run is in $workdir:
  summary.json    final evaluation of each stage
  report.html     to look at: curves, what happened, responses as they forked
  curves.png      the course of training, as a picture
  rollouts/       sampled responses with their rewards, tags visible
  metrics.jsonl   all figures, one line per step
  tensorboard/    the same: pip install tensorboard, then
                  tensorboard --logdir $workdir/tensorboard
Ask the model:
  $VENV/bin/python -m pr1_jax.chat --checkpoint=$workdir
END
