#!/bin/bash
# A toy on two GPUs, or without any on two processes of the CPU: a tiny config (MODEL) on bytes of
# text, from random weights. Needs Megatron-Core 0.17 to 0.19, from the wheel, and no
# Transformer Engine. Further arguments of this script go to Megatron.
#
# Both GPUs hold all layers (PP 1), half of the experts of each MoE layer (EP 2), and see different
# samples (DP 2).
set -euo pipefail
: "${MODEL:?a folder with a tiny config.json}"
export STEP35_CONFIG="$MODEL"
HERE=$(dirname "${BASH_SOURCE[0]}")

# Without a GPU, what step35_patch.arguments.CPU_ARGUMENTS has.
WITHOUT_GPU=()
if ! command -v nvidia-smi >/dev/null; then
    mapfile -t WITHOUT_GPU < <(python -c \
        'from step35_patch.arguments import CPU_ARGUMENTS; print(*CPU_ARGUMENTS, sep="\n")')
fi
torchrun --standalone --nproc-per-node 2 "$HERE/pretrain_step35.py" \
    "${WITHOUT_GPU[@]}" \
    --transformer-impl local \
    --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall \
    --tokenizer-type NullTokenizer --seq-length 64 --num-workers 0 \
    --micro-batch-size 2 --global-batch-size 8 --train-iters "${ITERATIONS:-20}" \
    --no-create-attention-mask-in-dataloader \
    --lr 1e-3 --lr-decay-style constant --clip-grad 1.0 \
    --moe-router-bias-update-rate 1e-3 \
    --eval-iters 0 --eval-interval 1000 --log-interval 1 \
    "$@"
