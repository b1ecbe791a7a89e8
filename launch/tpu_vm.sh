#!/usr/bin/env bash
# One process on every host of a TPU VM slice, over ssh. The checkout and the environment must be there already.
#
#   CONFIG=configs/pretrain.py WORKDIR=/mnt/shared/run TPU_NAME=slice TPU_ZONE=us-east5-a bash launch/tpu_vm.sh
#
#   TPU_NAME, TPU_ZONE  the slice                                                             (required)
#   TPU_PROJECT         its project, if it is not gcloud's default
#   REMOTE_ROOT         the checkout on the hosts, relative to the home folder                (default mg3d_jax)
#
# WORKDIR must be a file system that all hosts share (Filestore, or a bucket mounted with gcsfuse). Every host runs this
# script with --worker, which starts training again after a preemption that left the host alive. A slice that is gone has
# to be created again; the same command then goes on. --dry-run prints the commands.
#

# shellcheck disable=SC2329 # the functions are called by with_restarts
set -euo pipefail
MG3D_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
. "$MG3D_ROOT/launch/common.sh"
WORKER=0
if [ "${1:-}" = --worker ]; then WORKER=1 && shift; fi
HOSTS_SETUP=${ENV_SETUP:-}
if [ "$WORKER" = 0 ]; then ENV_SETUP=; fi # a file on the hosts: they source it
parse_arguments "${BASH_SOURCE[0]}" "$@"
ENV_SETUP=$HOSTS_SETUP

attempt() {
  # TPU hosts find each other by their metadata server, which only --cluster=tpu makes JAX ask.
  env MG3D_CLUSTER=tpu "${TRAIN[@]}" &
  watch $!
}

if [ "$WORKER" = 1 ]; then
  export PYTHONPATH=$MG3D_ROOT${PYTHONPATH:+:$PYTHONPATH}
  if [ "$DRY_RUN" = 1 ]; then
    show MG3D_CLUSTER=tpu "${TRAIN[@]}"
    exit 0
  fi
  mkdir -p "$WORKDIR"
  code=0
  with_restarts attempt || code=$?
  exit "$code"
fi

[ -n "${TPU_NAME:-}" ] || die "set TPU_NAME, the name of the slice"
[ -n "${TPU_ZONE:-}" ] || die "set TPU_ZONE, e.g. TPU_ZONE=us-east5-a"
variables=()
for name in CONFIG WORKDIR OVERRIDES EXPECTED_DEVICES MAX_RESTARTS RESTART_DELAY STOP_SECONDS ENV_SETUP PYTHON; do
  if [ -n "${!name:-}" ]; then variables+=("$name=${!name}"); fi
done
words=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do shift; done
if [ $# -gt 0 ]; then words=("$@"); fi
remote="cd $(printf '%q' "${REMOTE_ROOT:-mg3d_jax}") && env $(show "${variables[@]}") bash launch/tpu_vm.sh --worker"
if [ ${#words[@]} -gt 0 ]; then remote+=" $(show "${words[@]}")"; fi
COMMAND=(gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone "$TPU_ZONE" ${TPU_PROJECT:+--project "$TPU_PROJECT"})
COMMAND+=(--worker=all --command "$remote")
if [ "$DRY_RUN" = 1 ]; then
  show "${COMMAND[@]}"
  exit 0
fi
exec "${COMMAND[@]}"
