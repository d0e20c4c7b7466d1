#!/usr/bin/env bash
# Train on a Slurm cluster, one process for each GPU; from a login node, or inside an allocation:
#
#   GPUS=16 tools/slurm_train.sh PARTITION JOB_NAME CONFIG [options of tools/train.py]
#
# GPUS            processes in all (8)
# GPUS_PER_NODE   of them on each node (8, or GPUS if that is less)
# CPUS_PER_TASK   cores for each process and its data workers (of the job, or 5)
# SRUN_ARGS       more options of srun, as in SRUN_ARGS='--time=24:00:00 --exclusive'
# PYTHON          the interpreter (python)
# SIGNAL          what Slurm sends, and how many seconds before the time is up (USR1@120): the run
#                 saves and ends with status 75
# RESTARTS        how often a queued job may have run again for one that failed to be queued, too (0)
#
# A queued job (sbatch --requeue) is then queued again, and a job that runs again goes on with
# --resume, after preemption or a node that failed, too: docs/scaling.md.
set -euo pipefail

if (($# < 3)); then
  echo "usage: [GPUS=16] $0 PARTITION JOB_NAME CONFIG [options of tools/train.py]" >&2
  exit 2
fi
partition=$1 name=$2 config=$3
shift 3
gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
if ((gpus % per_node)); then
  echo "GPUS=$gpus is no multiple of GPUS_PER_NODE=$per_node" >&2
  exit 2
fi
read -ra srun_args <<<"${SRUN_ARGS:-}"

root=$(dirname "$(dirname "$(realpath "$0")")")
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# runs of other people on the same node would want the default port
export MASTER_PORT=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-$$} % 20000))}
trap : TERM USR1  # the run gets them, too, and is waited for
resume=()
if ((${SLURM_RESTART_COUNT:-0} > 0)); then
  resume=(--resume)
fi
status=0
srun \
  --partition="$partition" \
  --job-name="$name" \
  --gres="gpu:$per_node" \
  --ntasks="$gpus" \
  --ntasks-per-node="$per_node" \
  --cpus-per-task="${CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-5}}" \
  --kill-on-bad-exit=1 \
  --signal="${SIGNAL:-USR1@120}" \
  "${srun_args[@]}" \
  "${PYTHON:-python}" -u "$root/tools/train.py" "$config" --launcher slurm \
  "$@" "${resume[@]}" || status=$?
if ((status == 75 || (status && ${SLURM_RESTART_COUNT:-0} < ${RESTARTS:-0}))) && [[ -n ${SLURM_JOB_ID:-} ]]; then
  scontrol requeue "$SLURM_JOB_ID" || true  # it says why not
fi
exit "$status"
