#!/bin/bash
# Fine-tuning on 8 nodes of 8 GPUs, arguments in arrays. Started on each node, with NODE_RANK.
set -euo pipefail
export CUDA_DEVICE_MAX_CONNECTIONS=1
export STEP35_PATCH=1
export STEP35_CONFIG=/models/Step-3.5-Flash

GPUS_PER_NODE=8
NNODES=${NNODES:-8}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}

DISTRIBUTED_ARGS=(
    --nproc-per-node "$GPUS_PER_NODE" --nnodes "$NNODES" --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR" --master-port 6000
)
CP_COMM_TYPES=(p2p)
for _ in {1..11}; do CP_COMM_TYPES+=(a2a a2a a2a p2p); done
PARALLEL_ARGS=(
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 8
    --pipeline-model-parallel-layout 'Ett|(tt|)*21t|mmmL'  # 24 virtual stages
    --context-parallel-size 8
    --cp-comm-type "${CP_COMM_TYPES[@]}"
    --expert-model-parallel-size 8
    --expert-tensor-parallel-size 1
    --use-distributed-optimizer
)
MODEL_ARGS=(
    --transformer-impl transformer_engine
    --moe-grouped-gemm
    --moe-token-dispatcher-type alltoall
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --bf16
)
DATA_ARGS=(
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model /models/Step-3.5-Flash
    --data-path 0.7 /data/web 0.3 /data/code --split 99,1,0
    --seq-length 131072
    --micro-batch-size 1
    --global-batch-size 32
)
TRAINING_ARGS=(
    --train-iters 1400
    --lr 1e-5 --min-lr 5e-6 --lr-decay-style cosine --lr-warmup-iters 140
    --weight-decay 0.1 --step35-decay-1d --adam-beta2 0.95 --clip-grad 1.0
    --load /checkpoints/start --save /checkpoints/run --save-interval 100
    --eval-iters 0 --log-interval 1
)
torchrun "${DISTRIBUTED_ARGS[@]}" /src/Megatron-LM/pretrain_gpt.py \
    "${PARALLEL_ARGS[@]}" \
    "${MODEL_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${TRAINING_ARGS[@]}" \
    "$@"
