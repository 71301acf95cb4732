# The authors' fine-tuning of Step-3.5-Flash on 64 GPUs, as Megatron's arguments. Read by
# sft_slurm.sh and sft_torchrun.sh. Needs Megatron-LM 0.18 or 0.19 (0.17 spells --muon-nesterov
# otherwise), Transformer Engine, and pip install 'step35_patch[muon]'.
#
# 64 GPUs = 8 pipeline stages x 8 GPUs, one stage a node. The 8 GPUs of a stage share each sequence
# (CP 8), and hold 36 of the 288 experts each (EP 8): only pipeline stages talk between nodes.
#
# The pipeline has 24 virtual stages, 3 on each node; virtual stage v is on node v % 8:
#   stage  0      embedding, layers 0 and 1           (both with a dense MLP)
#   stage  v      layers 2v and 2v + 1, to stage 21   (layer 2 is dense, the others MoE; 4, 8, ...
#                                                      have full attention, all others the window)
#   stage 22      layer 44                            (full attention)
#   stage 23      the MTP layers 45 to 47, their output matrices and the loss
# So node 0 holds layers 0 1, 16 17, 32 33, and node 7 holds 14 15, 30 31 and the MTP layers.

: "${MEGATRON_LM:?a checkout of Megatron-LM}"
: "${MODEL:?a folder with the published config.json and tokenizer}"
: "${START:?what step35-patch convert to-megatron wrote of it}"
: "${DATA:?a JSONL file of conversations}"
: "${OUT:?a folder for checkpoints}"

export STEP35_PATCH=1 STEP35_CONFIG="$MODEL"
export CUDA_DEVICE_MAX_CONNECTIONS=1

# One way of sending for each decoder layer: keys and values go round in a ring where attention is
# full; where it has a window, Transformer Engine needs a2a, for which 8 groups go into CP 8.
# The MTP layers have the last sliding layer's.
CP_COMM_TYPES=(p2p)
for _ in {1..11}; do CP_COMM_TYPES+=(a2a a2a a2a p2p); done

LAYOUT=(
    --transformer-impl transformer_engine
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 8
    --pipeline-model-parallel-layout 'Ett|(tt|)*21t|mmmL'
    --context-parallel-size 8
    --cp-comm-type "${CP_COMM_TYPES[@]}"
    --expert-model-parallel-size 8
    --expert-tensor-parallel-size 1
    --moe-token-dispatcher-type alltoall
    --moe-grouped-gemm
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --bf16
)
BATCHES=(
    --sft --tokenizer-type SFTTokenizer --tokenizer-model "$MODEL"
    --sft-tokenizer-prompt-format default
    --data-path "$DATA" --split 100,0,0
    --seq-length 131072
    --micro-batch-size 1
    --global-batch-size 32
    --train-iters "${ITERATIONS:-1400}"
    --calculate-per-token-loss
)
# Muon for every matrix but embedding and output, Adam for the rest; each rank updates some of the
# whole matrices. By `step35-patch estimate` the last stage still needs 98 GiB then, of which its four
# losses' logits are the most: docs/estimate.md lists what brings it below 80.
OPTIMIZER=(
    --optimizer muon --use-distributed-optimizer
    --muon-momentum 0.95 --muon-nesterov
    --muon-coefficient-type polar_express --muon-num-ns-steps 6
    --muon-scale-mode spectral --muon-extra-scale-factor 0.2
    --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8
    --weight-decay 0.1 --step35-decay-1d
    --lr 1e-5 --min-lr 5e-6 --lr-decay-style cosine --lr-warmup-iters 140
    --clip-grad 1.0
    --moe-router-bias-update-rate 0
)
CHECKPOINTS=(
    --load "$START" --exit-on-missing-checkpoint
    --save "$OUT" --save-interval 200 --ckpt-format torch_dist
    --eval-iters 0 --eval-interval 1000 --log-interval 1
)
ARGUMENTS=("${LAYOUT[@]}" "${BATCHES[@]}" "${OPTIMIZER[@]}" "${CHECKPOINTS[@]}")
