#!/bin/bash
# As many of Megatron-LM's own examples: arguments in strings, which bash splits; two programs.
export CUDA_DEVICE_MAX_CONNECTIONS=1
CHECKPOINT_PATH=$1
DATA_PATH=$2

GPUS_PER_NODE=8
NNODES=6
WORLD_SIZE=$(($GPUS_PER_NODE*$NNODES))

DISTRIBUTED_ARGS="
    --nproc_per_node $GPUS_PER_NODE \
    --nnodes $NNODES \
    --master_addr $MASTER_ADDR
"
GPT_ARGS="
    --tensor-model-parallel-size 2
    --sequence-parallel
    --pipeline-model-parallel-size 3
    --num-virtual-stages-per-pipeline-rank 5
    --expert-model-parallel-size 8
    --seq-length 4096
    --micro-batch-size 1
    --global-batch-size $((WORLD_SIZE * 2))
    --lr 0.00015
    --train-iters 500000
    --lr-decay-iters 320000
    --lr-decay-style cosine
    --weight-decay 0.1
    --step35-decay-1d
    --adam-beta2 .95
    --bf16
    --moe-token-dispatcher-type alltoall
"
DATA_ARGS="
    --data-path $DATA_PATH
    --split 949,50,1
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model /models/step
"
python tools/preprocess_data.py --input raw.jsonl --output-prefix $DATA_PATH

STEP35_PATCH=1 torchrun $DISTRIBUTED_ARGS pretrain_gpt.py \
    $GPT_ARGS \
    $DATA_ARGS \
    --step35-config /models/step \
    --save $CHECKPOINT_PATH --save-interval 1000 \
    --load $CHECKPOINT_PATH 2>&1 | tee log.txt
