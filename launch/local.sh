#!/usr/bin/env bash
# N processes on this host, joined over localhost.
#
#   CONFIG=configs/quickstart.py WORKDIR=runs/two OVERRIDES="--config.data.train=DIR" bash launch/local.sh
#
# On a host with GPUs one process is enough for all of them (NUM_PROCESSES=1); several processes share the GPUs evenly
# when CUDA_VISIBLE_DEVICES lists them. The output of process 0 is shown, that of process N goes to
# WORKDIR/logs/process-N.log. --dry-run prints the commands. COORDINATOR_PORT fixes the port (default: a free one).
#

# shellcheck disable=SC2329 # the functions are called by with_restarts
set -euo pipefail
MG3D_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
. "$MG3D_ROOT/launch/common.sh"
parse_arguments "${BASH_SOURCE[0]}" "$@"
export PYTHONPATH=$MG3D_ROOT${PYTHONPATH:+:$PYTHONPATH}

# gpus_of PROCESS: its share of CUDA_VISIBLE_DEVICES, if several processes are to share several GPUs.
gpus_of() {
  local all=() share
  IFS=, read -r -a all <<<"${CUDA_VISIBLE_DEVICES:-}"
  if [ "$NUM_PROCESSES" -lt 2 ] || [ ${#all[@]} -lt 1 ]; then return; fi
  [ $((${#all[@]} % NUM_PROCESSES)) -eq 0 ] || die "$NUM_PROCESSES processes cannot share ${#all[@]} GPUs evenly"
  share=$((${#all[@]} / NUM_PROCESSES))
  (IFS=, && echo "CUDA_VISIBLE_DEVICES=${all[*]:$(($1 * share)):$share}")
}

free_port() { "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

attempt() {
  local port i gpus pids=() variables
  # with_restarts switches `set -e` off in here.
  port=${COORDINATOR_PORT:-$(free_port)} || exit 2
  for ((i = 0; i < NUM_PROCESSES; i++)); do
    variables=("MG3D_COORDINATOR=localhost:$port" "MG3D_NUM_PROCESSES=$NUM_PROCESSES" "MG3D_PROCESS_ID=$i")
    gpus=$(gpus_of "$i") || exit 2 # process 0 is the first: nothing runs yet
    if [ -n "$gpus" ]; then variables+=("$gpus"); fi
    if [ "$DRY_RUN" = 1 ]; then
      show "${variables[@]}" "${TRAIN[@]}"
    elif [ "$i" = 0 ]; then
      env "${variables[@]}" "${TRAIN[@]}" &
      pids+=($!)
    else
      env "${variables[@]}" "${TRAIN[@]}" >>"$WORKDIR/logs/process-$i.log" 2>&1 &
      pids+=($!)
    fi
  done
  if [ "$DRY_RUN" = 1 ]; then return 0; fi
  watch "${pids[@]}"
}

if [ "$DRY_RUN" = 0 ]; then mkdir -p "$WORKDIR/logs"; fi
code=0
with_restarts attempt || code=$?
if [ "$code" -ne 0 ]; then echo "local.sh: exit code $code; logs of the other processes: $WORKDIR/logs" >&2; fi
exit "$code"
