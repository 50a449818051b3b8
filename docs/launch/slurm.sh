#!/bin/bash
#SBATCH --nodes 2 --ntasks-per-node 8 --gpus-per-node 8
#SBATCH --signal TERM@120
# One task per rank:  sbatch docs/launch/slurm.sh qwen3.train --config qwen3_14b
# Two minutes before its time is over the job is asked to stop; a rank that fails ends the others.
srun --kill-on-bad-exit=1 python -m "$@"
