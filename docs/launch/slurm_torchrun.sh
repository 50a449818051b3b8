#!/bin/bash
#SBATCH --nodes 2 --ntasks-per-node 1 --gpus-per-node 8
#SBATCH --signal TERM@120
# One torchrun per machine, which starts all ranks again after one has failed:
#   sbatch docs/launch/slurm_torchrun.sh qwen3.train --config qwen3_14b
export NODES=$SLURM_NNODES RANKS=$SLURM_GPUS_ON_NODE NAME=$SLURM_JOB_ID
export MEET=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((12000 + SLURM_JOB_ID % 20000))
srun --kill-on-bad-exit=1 docs/launch/torchrun.sh -m "$@"
