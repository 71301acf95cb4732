#!/bin/bash
# Pre-training of a Step-3.5-Flash from random weights on 64 GPUs: run it on each of 8 nodes, with
# NODE_RANK 0 to 7 and HEAD the first one's address. Needs Megatron-LM 0.17 to 0.19 and Transformer
# Engine.
#
# 64 GPUs = 8 pipeline stages x 8 GPUs, one stage a node. The 8 GPUs of a stage see different
# sequences (DP 8) and hold 36 of the 288 experts each (EP 8). 4,096 tokens need no context
# parallelism. Stages and their layers are those of sft_arguments.sh: 24 virtual stages of 2 layers,
# one of 1 (layer 44), and one of the MTP layers 45 to 47 with the loss.
set -euo pipefail
: "${MEGATRON_LM:?a checkout of Megatron-LM}"
: "${MODEL:?a folder with config.json and tokenizer}"
: "${DATA:?the prefix of what tools/preprocess_data.py wrote}"
: "${OUT:?a folder for checkpoints}"
export STEP35_PATCH=1 STEP35_CONFIG="$MODEL"
export CUDA_DEVICE_MAX_CONNECTIONS=1

LAYOUT=(
    --transformer-impl transformer_engine
    --pipeline-model-parallel-size 8
    --pipeline-model-parallel-layout 'Ett|(tt|)*21t|mmmL'
    --expert-model-parallel-size 8
    --moe-token-dispatcher-type alltoall
    --moe-grouped-gemm
    --use-distributed-optimizer
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --bf16
)
BATCHES=(
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$MODEL"
    --data-path "$DATA" --split 99,1,0
    --seq-length 4096
    --micro-batch-size 1
    --global-batch-size 1024
    --train-iters "${ITERATIONS:-100000}"
    --no-create-attention-mask-in-dataloader
)
# From random weights something has to balance the experts: here the bias moves.
OPTIMIZER=(
    --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8
    --weight-decay 0.1
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 2000
    --clip-grad 1.0
    --init-method-std 0.008
    --moe-router-bias-update-rate 1e-3
)
CHECKPOINTS=(
    --load "$OUT" --save "$OUT" --save-interval 1000 --ckpt-format torch_dist
    --eval-iters 10 --eval-interval 1000 --log-interval 1
)
torchrun --nnodes 8 --nproc-per-node 8 --node-rank "${NODE_RANK:?0 to 7}" \
    --master-addr "${HEAD:?address of node 0}" --master-port 29500 \
    "$MEGATRON_LM/pretrain_gpt.py" \
    "${LAYOUT[@]}" "${BATCHES[@]}" "${OPTIMIZER[@]}" "${CHECKPOINTS[@]}"
