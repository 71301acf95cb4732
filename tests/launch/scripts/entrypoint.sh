#!/usr/bin/env bash
# A container's entry point: options of its own, the rest to Megatron.
set -e
usage() { echo "usage: $0 [--nodes N] [--debug] [-- ARGS]" >&2; exit 1; }

nodes=1
debug=0
while [[ $# -gt 0 ]]; do
    case "$1" in
        --nodes) nodes="$2"; shift 2 ;;
        --debug) debug=1; shift ;;
        --) shift; break ;;
        *) usage ;;
    esac
done

layout() {
    local pipeline=$1 tensor=$2
    ARGS+=(--pipeline-model-parallel-size "$pipeline" --tensor-model-parallel-size "$tensor")
    if (( tensor > 1 )); then ARGS+=(--sequence-parallel); fi
}

gpus=${GPUS_PER_NODE:-8}
world=$((nodes * gpus))
ARGS=(--bf16 --moe-token-dispatcher-type alltoall --moe-grouped-gemm)
if (( world >= 40 )); then
    layout 5 1
else
    layout 1 8
fi
if [ "$debug" -eq 1 ]; then
    ARGS+=(--train-iters 5)
else
    ARGS+=(--train-iters 10000 --save /out --save-interval 500)
fi
[[ -n "${WANDB_PROJECT:-}" ]] && ARGS+=(--wandb-project "$WANDB_PROJECT")
if [[ ! -f /data/index.bin ]]; then
    echo "no data" >&2
    exit 1
fi
export CUDA_DEVICE_MAX_CONNECTIONS=1
exec env STEP35_CONFIG=/models/step python -m torch.distributed.run \
    --nnodes="$nodes" --nproc_per_node="$gpus" -m step35_patch pretrain_gpt.py \
    "${ARGS[@]}" \
    --expert-model-parallel-size "$gpus" --expert-tensor-parallel-size 1 \
    --tokenizer-type NullTokenizer --mock-data --seq-length 8192 --micro-batch-size 1 \
    --global-batch-size 128 --lr 3e-4 --load /models/start --eval-iters 0 "$@"
