#!/usr/bin/env bash
# Runs pr1_jax on the GPUs of a SLURM cluster, one process a node with all its GPUs.
#
#   launch/slurm.sh all --name=pr1 --nodes=2 --gpus-per-node=8 --time=24:00:00 \
#       -- --config=configs/rl_alternating.py:qwen3_4b --workdir=/shared/pr1
#
#   install  makes .venv in this checkout, which all nodes must see
#   submit   submits the job, unless one of that name is queued or running
#   tail     follows the log
#   status   shows the job in the queue
#   cancel   cancels the job; SIGTERM lets it save first
#   all      install, submit, status
#
#   --name
#   --nodes=1, --gpus-per-node=8
#   --time           limit of one allocation, e.g. 24:00:00; by default the partition's
#   --partition, --account, --cpus-per-task
#   --sbatch-flags   more flags for sbatch, e.g. "--qos=low --exclusive"
#   --grace-sec=120  SIGTERM comes so long before the time limit, to save
#   --restarts=50    how often the job is queued again after a preemption, a failure or
#                    the time limit; a wrong config (exit code 2) is not
#   --dry-run        prints every command and the job script, and runs none
#
# Each action may be repeated: what is done already is left alone. Flags of
# pr1_jax.main go behind `--`; --distributed is added to them. Script and log are
# build/launch/NAME.sbatch and NAME.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR/..
source launch/common.sh

parse "name nodes gpus-per-node time partition account cpus-per-task sbatch-flags \
grace-sec restarts" "" "$@"
need_numbers nodes gpus-per-node cpus-per-task grace-sec restarts

# Prints "ID STATE" of our jobs of this name.
queued() {
  ask squeue --noheader --user="$(id -un)" --name="${FLAG[name]}" --format='%i %T'
}

# JAX takes one GPU for each process under SLURM unless it is told otherwise.
# `trap :` keeps this shell alive where SLURM signals it as well, so that it can put
# the job back: not if it was cancelled, for then its state is no longer RUNNING.
job_script() {
  local gpus=${FLAG[gpus-per-node]:-8} devices
  printf -v devices '%s,' $(seq 0 $((gpus - 1)))
  cat <<END
#!/usr/bin/env bash
set -uo pipefail
cd $(quote "$PWD")
export JAX_LOCAL_DEVICE_IDS=${devices%,}
trap : TERM
status=0
srun --kill-on-bad-exit=1 --cpu-bind=none${FLAG[cpus-per-task]:+ --cpus-per-task=${FLAG[cpus-per-task]}} \\
  $(quote bash launch/host.sh supervise -- --distributed "${PROGRAM[@]}") || status=\$?
if ((status != 0 && status != 2 && \${SLURM_RESTART_COUNT:-0} < ${FLAG[restarts]:-50})) &&
  [[ \$(squeue --noheader --jobs="\$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
  echo "exit code \$status: the job is queued again"
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$status"
END
}

do_install() { run bash launch/host.sh setup gpu; }

do_submit() {
  local found more file=build/launch/${FLAG[name]}.sbatch
  need_program
  found=$(queued)
  if [[ -n $found ]]; then
    say "${FLAG[name]} is there: $found"
    return
  fi
  read -ra more <<<"${FLAG[sbatch-flags]:-}"
  if ((DRY_RUN)); then
    job_script | sed 's/^/# /'
  else
    mkdir -p "${file%/*}"
    job_script >"$file"
  fi
  run sbatch --job-name="${FLAG[name]}" --nodes="${FLAG[nodes]:-1}" --ntasks-per-node=1 \
    --gpus-per-node="${FLAG[gpus-per-node]:-8}" --requeue --open-mode=append \
    --output="$PWD/build/launch/${FLAG[name]}.log" \
    --signal="TERM@${FLAG[grace-sec]:-120}" \
    ${FLAG[time]:+"--time=${FLAG[time]}"} \
    ${FLAG[partition]:+"--partition=${FLAG[partition]}"} \
    ${FLAG[account]:+"--account=${FLAG[account]}"} \
    ${FLAG[cpus-per-task]:+"--cpus-per-task=${FLAG[cpus-per-task]}"} \
    "${more[@]}" "$file"
}

do_tail() { run tail --lines=100 --follow=name --retry "build/launch/${FLAG[name]}.log"; }

do_status() {
  local found
  found=$(queued)
  report "${found:-no job ${FLAG[name]} is queued or running}"
}

do_cancel() {
  local found
  found=$(queued)
  if [[ -z $found && $DRY_RUN == 0 ]]; then
    say "no job ${FLAG[name]} is queued or running"
  else
    run scancel --user="$(id -un)" --name="${FLAG[name]}"
  fi
}

do_all() {
  do_install
  do_submit
  do_status
}

case $ACTION in
  install) ;;
  submit | tail | status | cancel) need name ;;
  all)
    need name
    need_program
    ;;
  *) fail "${ACTION:-an action} is not one of install, submit, tail, status, cancel, all" ;;
esac
if [[ -n ${FLAG[name]:-} && ! ${FLAG[name]} =~ ^[a-zA-Z0-9._-]+$ ]]; then
  fail "--name=${FLAG[name]}: letters, digits and . _ - are allowed"
fi
"do_$ACTION"
