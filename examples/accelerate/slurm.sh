#!/usr/bin/env bash
# Two nodes of eight GPUs: sbatch examples/accelerate/slurm.sh RECIPE [--option value ...]
#SBATCH --job-name=sailer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST") # a pipe to head may end this script by SIGPIPE
launch=(torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" --rdzv_backend c10d
    --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "${nodes[0]}:${MASTER_PORT:-29500}")

# SIGTERM comes to this script (B:) 120 s before the limit, and goes on to the run, which saves its state and ends. Only
# then is the job queued again, which would kill the run at once. resume_from_checkpoint has it go on; from the first
# start there is nothing to go on from, and it starts afresh.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100 # seconds that torchrun leaves its processes, 30 without it
stopped=
stop() { stopped=yes && kill -TERM "$run"; }
trap stop TERM
srun --kill-on-bad-exit=1 "${launch[@]}" train.py "$@" --resume_from_checkpoint true &
run=$!
status=0
wait "$run" || status=$?
if [ -n "$stopped" ]; then # the signal ended the first wait
    wait "$run" && exit
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
