#!/bin/bash
# One run on all GPUs of several nodes:  sbatch examples/slurm.sh
# The same command begins a run and continues it, so a job that was requeued goes on from its last checkpoint.
# The repository, the pictures and the output_dir have to be on a disk that all nodes see.
#SBATCH --job-name=domainstudio
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail

MAIN_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Each node tells accelerate its own number.
srun --kill-on-bad-exit=1 bash -c 'accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
    --multi_gpu --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * 4))" \
    --main_process_ip "$MAIN_NODE" --main_process_port 29500 \
    --mixed_precision no --dynamo_backend no \
    -m domainstudio train recipes/avatars-to-ink.toml \
    --train-batch-size 32 --pair-batch-size 32 \
    --resume-from-checkpoint latest
