#!/usr/bin/env bash
# One training run over several machines, started by hand: run this on each of them.
#
#   NODES=4 NODE=0 MAIN=node0.example:29500 cluster/torchrun.sh recipes/qwen3_32b_32gpu.toml [ARGUMENT ...]
#
# NODES machines, this one is NODE (from 0), MAIN is an address of machine 0 that all of them reach.
# Code, environment, recipe, data and model must be there on each, and all must see the run folder.
set -euo pipefail
: "${NODES:?the number of machines}" "${NODE:?the number of this machine, from 0}"
: "${MAIN:?HOST:PORT of machine 0}"

# static: c10d would number the machines by the names of their hosts, not by NODE.
exec torchrun \
    --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "${GPUS:-8}" \
    --rdzv-backend static --rdzv-endpoint "$MAIN" --rdzv-id "${RUN_ID:-hsd}" \
    --max-restarts 0 \
    -m hsd.train "$@"
