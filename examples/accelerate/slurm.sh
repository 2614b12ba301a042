#!/usr/bin/env bash
# Two nodes of eight GPUs: sbatch examples/accelerate/slurm.sh RECIPE [--option value ...]
#SBATCH --job-name=sailer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
launch=(torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID"
    --rdzv_endpoint "$first:29500")

# SIGTERM comes 120 s before the limit: the run saves its state and ends. When it did not finish, it is queued again,
# and resume_from_checkpoint has it go on; from the first start there is nothing to go on from, and it starts afresh.
requeue() { scontrol requeue "$SLURM_JOB_ID"; }
trap requeue TERM
srun --kill-on-bad-exit=1 "${launch[@]}" train.py "$@" --resume_from_checkpoint true &
wait $! || { status=$?; wait; exit "$status"; }
