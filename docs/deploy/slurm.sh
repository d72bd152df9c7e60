#!/usr/bin/env bash
# Trains on all GPUs of several nodes, a task of SLURM for each, and begins again until the run is done:
#   sbatch docs/deploy/slurm.sh run.yaml
#SBATCH --job-name=panda
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

config=$1
run=$SLURM_SUBMIT_DIR/runs/$SLURM_JOB_NAME  # on a file system that all nodes share
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${nodes%%$'\n'*}  # the first one
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

# The run saves and ends half an hour before the job's time is over, with exit code 75.
code=0
srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec panda-train --config "$0" --output_dir "$1" --resume auto --max_train_hours 11.5
' "$config" "$run" || code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
