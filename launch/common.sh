# shellcheck shell=bash disable=SC2034
# Sourced by the launchers: one set of variables, one command, one rule for what is run again.
#
#   CONFIG            config file, FILE[:ARG]                                                   (required)
#   WORKDIR           folder of the run, the same on all hosts: checkpoints, metrics, logs      (required)
#   OVERRIDES         more words for `mg3d train`, e.g. "--config.data.train=DIR --config.seed=1";
#                     words with spaces go after the launcher's own options instead: LAUNCHER -- WORD...
#   NUM_PROCESSES     processes on this host                                                    (local.sh; default 2)
#   EXPECTED_DEVICES  devices that each process must see; another number is an error
#   MAX_RESTARTS      how often the run is started again after a stop that is worth it          (default 3)
#   RESTART_DELAY     seconds before it is started again                                        (default 1)
#   STOP_SECONDS      seconds that processes have to save and leave when one was told to stop   (default 120)
#   ENV_SETUP         shell file to source first, e.g. one that loads modules
#   PYTHON            interpreter                                                               (default python)
#
# Exit codes: 0 done; 75 stopped by SIGTERM with everything saved, run it again; 2 a mistake in the command or config.
# The run is started again after 75 and after a process died of a signal (node lost, out of memory); never after 2.

NUM_PROCESSES=${NUM_PROCESSES:-2}
MAX_RESTARTS=${MAX_RESTARTS:-3}
RESTART_DELAY=${RESTART_DELAY:-1}
STOP_SECONDS=${STOP_SECONDS:-120}
PYTHON=${PYTHON:-python}
DRY_RUN=0
MG3D_PREEMPTED=75

die() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# parse_arguments LAUNCHER "$@": sets DRY_RUN and TRAIN, the command of one process.
parse_arguments() {
  local launcher=$1 extra=()
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      --dry-run) DRY_RUN=1 ;;
      -h | --help)
        sed -n '/^#!/d; /^#SBATCH/d; /^# shellcheck/q; /^#/!q; s/^# \{0,1\}//p' "$launcher"
        sed -n '2,/^$/{/^#/!d; s/^# \{0,1\}//p;}' "$MG3D_ROOT/launch/common.sh"
        exit 0
        ;;
      --)
        shift
        extra=("$@")
        break
        ;;
      *) die "unknown option $1; words for mg3d train go after --, or into OVERRIDES" ;;
    esac
    shift
  done
  [ -n "${CONFIG:-}" ] || die "set CONFIG=FILE[:ARG], e.g. CONFIG=configs/quickstart.py"
  [ -n "${WORKDIR:-}" ] || die "set WORKDIR, the folder of the run, on a disk that all hosts share"
  local overrides=()
  read -r -d '' -a overrides <<<"${OVERRIDES:-}" || true # all lines; at the end of the text `read` returns 1
  TRAIN=("$PYTHON" -m mg3d_jax train --config "$CONFIG" --workdir "$WORKDIR" "${overrides[@]}" "${extra[@]}")
  if [ -n "${ENV_SETUP:-}" ]; then load_environment "$ENV_SETUP"; fi
  if [ -n "${EXPECTED_DEVICES:-}" ]; then export MG3D_EXPECTED_DEVICES=$EXPECTED_DEVICES; fi
}

load_environment() {
  local file=$1
  shift # the file sees no arguments
  [ -r "$file" ] || die "ENV_SETUP=$file cannot be read"
  set +eu # module systems are not written for these
  # shellcheck disable=SC1090
  . "$file"
  set -eu
}

# show VAR=VALUE... COMMAND...: the command as it could be typed.
show() { printf '%q ' "$@" | sed 's/ $//' && echo; }

# worth_restarting CODE: saved and stopped, or dead by a signal.
worth_restarting() { [ "$1" -eq "$MG3D_PREEMPTED" ] || [ "$1" -ge 128 ]; }

# with_restarts FUNCTION: runs it until it ends well, ends badly, was told to stop, or has been restarted often enough.
with_restarts() {
  local code restarts=0
  STOPPING=0
  trap 'STOPPING=1' TERM INT
  while true; do
    code=0
    "$@" || code=$?
    trap 'STOPPING=1' TERM INT
    if [ "$STOPPING" = 1 ] || ! worth_restarting "$code"; then return "$code"; fi
    if [ "$restarts" -ge "$MAX_RESTARTS" ]; then
      echo "${0##*/}: exit code $code after $restarts restarts (MAX_RESTARTS): giving up; the same command goes on" >&2
      return "$code"
    fi
    restarts=$((restarts + 1))
    echo "${0##*/}: exit code $code: restart $restarts of $MAX_RESTARTS in $RESTART_DELAY s" >&2
    sleep "$RESTART_DELAY"
    if [ "$STOPPING" = 1 ]; then return "$MG3D_PREEMPTED"; fi
  done
}

# watch PID...: waits for the processes of one attempt and returns its exit code. SIGTERM and SIGINT are passed on as
# SIGTERM, upon which the processes save. When the first process has left, the others are given STOP_SECONDS if it had
# finished or saved (so will they), or 5 seconds (they hang in a collective), and are then killed.
watch() {
  local pids=("$@") code=0 limit=0 pid status alive
  trap 'STOPPING=1; pass_on' TERM INT
  pass_on() {
    limit=$((SECONDS + STOP_SECONDS))
    kill -TERM "${pids[@]}" 2>/dev/null || true
  }
  if [ "$STOPPING" = 1 ]; then pass_on; fi # told while the processes were being started
  while [ ${#pids[@]} -gt 0 ]; do
    alive=()
    for pid in "${pids[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        alive+=("$pid")
        continue
      fi
      status=0
      wait "$pid" || status=$?
      case $status in
        0 | "$MG3D_PREEMPTED") if [ "$limit" -eq 0 ]; then limit=$((SECONDS + STOP_SECONDS)); fi ;;
        *) limit=$((SECONDS + 5)) ;;
      esac
      code=$(worse "$code" "$status")
    done
    pids=("${alive[@]}")
    if [ ${#pids[@]} -gt 0 ]; then
      if [ "$limit" -gt 0 ] && [ "$SECONDS" -ge "$limit" ]; then
        echo "${0##*/}: ${#pids[@]} process(es) did not leave: killed" >&2
        kill -KILL "${pids[@]}" 2>/dev/null || true
        for pid in "${pids[@]}"; do wait "$pid" || true; done
        pids=()
        if [ "$code" -eq 0 ] || [ "$code" -eq "$MG3D_PREEMPTED" ]; then code=137; fi
      else
        sleep 0.2
      fi
    fi
  done
  return "$code"
}

# worse A B: the exit code that says what happened: a mistake of the user, a signal, another error, saved, done.
worse() {
  local a=$1 b=$2
  rank() { case $1 in 2) echo 4 ;; 0) echo 0 ;; "$MG3D_PREEMPTED") echo 1 ;; 1) echo 2 ;; *) echo 3 ;; esac; }
  if [ "$(rank "$a")" -ge "$(rank "$b")" ]; then echo "$a"; else echo "$b"; fi
}
