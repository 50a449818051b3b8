#!/bin/bash
# One job on several machines. The same on each of them, in the same folder of the checkout:
#   NODES=2 RANKS=8 MEET=host1:29500 NAME=first-try docs/launch/torchrun.sh -m qwen3.train --config qwen3_14b
# NODES machines with RANKS ranks each meet at MEET, a port of one of them; NAME is new for every job. RESTARTS (3) is
# how often all ranks start again after one has failed, on another machine too if it joins with this same command.
set -eu
# Without this a machine that joins later is not told where the others are (PyTorch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes "$NODES" --nproc-per-node "$RANKS" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$MEET" --rdzv-id "$NAME" "$@"
