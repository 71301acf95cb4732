#!/bin/bash
#SBATCH --job-name=step35
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
# Under Slurm, in a container, with a command in one string.
DIR=$(cd "$(dirname "$0")" && pwd)
LOGS="${DIR}/logs"
mkdir -p "$LOGS"
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MOUNTS="/lustre:/lustre,${DIR}:/workspace"
export STEP35_PATCH=1
export STEP35_CONFIG=/lustre/models/Step-3.5-Flash
export CUDA_DEVICE_MAX_CONNECTIONS=1

OPTIONS=" \
    --tensor-model-parallel-size 8 \
    --sequence-parallel \
    --pipeline-model-parallel-size 8 \
    --pipeline-model-parallel-layout 'Ett|(tt|)*21t|mmmL' \
    --expert-model-parallel-size 8 \
    --expert-tensor-parallel-size 1 \
    --moe-token-dispatcher-type alltoall \
    --moe-grouped-gemm \
    --bf16 \
    --optimizer muon --muon-momentum 0.95 --muon-nesterov --muon-scale-mode spectral \
    --muon-coefficient-type polar_express --muon-num-ns-steps 6 --muon-extra-scale-factor 0.2 \
    --muon-tp-mode duplicated \
    --weight-decay 0.1 --step35-decay-1d --adam-beta2 0.95 \
    --lr 1e-5 --min-lr 5e-6 --lr-decay-style cosine --lr-warmup-iters 140 \
    --sft --tokenizer-type SFTTokenizer --tokenizer-model ${STEP35_CONFIG} \
    --sft-tokenizer-prompt-format default --data-path ${DATA} \
    --seq-length 65536 --micro-batch-size 1 --global-batch-size 32 --train-iters 1400 \
    --load ${START} --save /lustre/runs/${SLURM_JOB_ID} --save-interval 100 \
    --eval-iters 0 --log-interval 1"
run_cmd="torchrun --nnodes $SLURM_NNODES --nproc-per-node $SLURM_GPUS_ON_NODE \
    --rdzv-backend c10d --rdzv-endpoint $MASTER:29500 --rdzv-id $SLURM_JOB_ID \
    /src/Megatron-LM/pretrain_gpt.py '--distributed-timeout-minutes' 30 ${OPTIONS}"
srun -l --container-image=nvcr.io/nvidia/pytorch:25.06-py3 --container-mounts="$MOUNTS" \
    --output="$LOGS/%x_%j.log" sh -c "$run_cmd"
