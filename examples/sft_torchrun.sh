#!/bin/bash
# The authors' fine-tuning on 64 GPUs: run it on each of 8 nodes, with NODE_RANK 0 to 7 and HEAD the
# first one's address. What the arguments mean is in sft_arguments.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/sft_arguments.sh"

torchrun --nnodes 8 --nproc-per-node 8 --node-rank "${NODE_RANK:?0 to 7}" \
    --master-addr "${HEAD:?address of node 0}" --master-port 29500 \
    "$MEGATRON_LM/pretrain_gpt.py" "${ARGUMENTS[@]}"
