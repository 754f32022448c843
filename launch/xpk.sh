#!/usr/bin/env bash
# Runs pr1_jax on TPUs of a GKE cluster by XPK (pip install xpk), one process a host.
#
#   launch/xpk.sh all --cluster=pods --name=pr1 --zone=us-west4-a --project=mine \
#       --type=v5litepod-16 --image=us-docker.pkg.dev/mine/images/pr1_jax:1 \
#       -- --config=configs/rl_alternating.py:qwen3_4b --workdir=/mnt/shared/pr1
#
#   cluster  makes the cluster, or changes its number of slices to --slices
#   build    builds the image (launch/Dockerfile) and pushes it
#   run      starts the workload, unless it is queued or running; one that has ended
#            is deleted and started again, and goes on from its last checkpoint
#   tail     follows the log of host 0 of slice 0
#   status   lists the workload
#   delete   deletes the workload; what it saved stays
#   all      build, run, status
#   delete-cluster
#
#   --cluster, --zone, --project
#   --name           of the workload: small letters, digits and -, at most 40
#   --type           v5litepod-16, v5p-32, v6e-8 ...
#   --slices=1       of the cluster and of the workload
#   --image          NAME:TAG in a registry that the cluster can read; new code needs
#                    a new tag, or nodes keep the image that they have
#   --cluster-flags  more flags for `xpk cluster create`; --on-demand (--spot, --flex,
#                    --reservation=NAME)
#   --run-flags      more flags for `xpk workload create`, e.g. "--priority=high"
#   --restarts=50    how often a workload that was preempted or failed starts again;
#                    a wrong config (exit code 2) is not started again
#   --grace-sec=300  to save when told to stop
#   --dry-run        prints every command and runs none
#
# Each action may be repeated: what is done already is left alone. Flags of
# pr1_jax.main go behind `--`; --distributed is added to them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR/..
source launch/common.sh

parse "cluster zone project name type slices image cluster-flags run-flags restarts \
grace-sec" "" "$@"
need_numbers slices restarts grace-sec

xpk_run() {
  run xpk "$@" --cluster="${FLAG[cluster]}" --zone="${FLAG[zone]}" \
    --project="${FLAG[project]}"
}

# Lets kubectl speak to the cluster, as xpk does. Clusters of xpk are regional.
connect() {
  run gcloud container clusters get-credentials "${FLAG[cluster]}" \
    --location="${FLAG[zone]%-*}" --project="${FLAG[project]}"
}

# Prints the workload's conditions behind its name; nothing if there is none.
workload() {
  ask kubectl get jobset "${FLAG[name]}" --namespace=default --ignore-not-found \
    --output=jsonpath='{.metadata.name}{" "}{.status.conditions[?(@.status=="True")].type}'
}

do_cluster() {
  local more
  need type
  read -ra more <<<"${FLAG[cluster-flags]:---on-demand}"
  xpk_run cluster create --tpu-type="${FLAG[type]}" --num-slices="${FLAG[slices]:-1}" \
    "${more[@]}"
}

do_build() {
  need image
  run docker build --file=launch/Dockerfile --build-arg=ACCELERATOR=tpu \
    --tag="${FLAG[image]}" .
  run docker push "${FLAG[image]}"
}

do_run() {
  local found
  need name type image
  need_program
  connect
  found=$(workload)
  case $found in
    '') ;;
    *Completed* | *Failed*)
      say "${FLAG[name]} has ended: starting it again"
      xpk_run workload delete --workload="${FLAG[name]}"
      ;;
    *)
      say "${FLAG[name]} is there: $found"
      return
      ;;
  esac
  create_workload
}

# XPK runs `(COMMAND) &` and passes SIGTERM on to that process, which `exec` makes
# ours. Kubernetes reads $$ as $ in a command. XPK restarts after 42 and 127 to 255,
# among them 143, "told to stop"; 1 is an error, as when another host was lost.
create_workload() {
  local more command
  read -ra more <<<"${FLAG[run-flags]:-}"
  command="exec $(quote bash launch/host.sh supervise -- --distributed "${PROGRAM[@]}")"
  xpk_run workload create --workload="${FLAG[name]}" --tpu-type="${FLAG[type]}" \
    --num-slices="${FLAG[slices]:-1}" --docker-image="${FLAG[image]}" \
    --max-restarts="${FLAG[restarts]:-50}" --restart-on-exit-codes=1 \
    --termination-grace-period-seconds="${FLAG[grace-sec]:-300}" \
    --command="${command//\$/\$\$}" "${more[@]}"
}

do_tail() {
  local job=jobset.sigs.k8s.io
  need name
  connect
  run kubectl logs --namespace=default --follow --tail=100 --all-containers \
    --selector="$job/jobset-name=${FLAG[name]},$job/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

do_status() {
  need name
  xpk_run workload list --filter-by-job="^${FLAG[name]}\$"
}

do_delete() {
  need name
  connect
  if [[ -z $(workload) && $DRY_RUN == 0 ]]; then
    say "${FLAG[name]} is not there"
  else
    xpk_run workload delete --workload="${FLAG[name]}"
  fi
}

do_delete_cluster() {
  local found
  found=$(ask gcloud container clusters list --filter="name=${FLAG[cluster]}" \
    --format='value(name)' --project="${FLAG[project]}")
  if [[ -z $found && $DRY_RUN == 0 ]]; then
    say "${FLAG[cluster]} is not there"
  else
    xpk_run cluster delete --force
  fi
}

do_all() {
  do_build
  do_run
  do_status
}

case $ACTION in
  cluster | build | run | tail | status | delete | all | delete-cluster) ;;
  *) fail "${ACTION:-an action} is not one of cluster, build, run, tail, status, delete," \
    "all, delete-cluster" ;;
esac
[[ $ACTION == build ]] || need cluster zone project
if [[ -n ${FLAG[name]:-} && ! ${FLAG[name]} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]]; then
  fail "--name=${FLAG[name]}: small letters, digits and - are allowed, at most 40"
fi
if [[ $ACTION == all ]]; then
  need name type image
  need_program
fi
"do_${ACTION//-/_}"
