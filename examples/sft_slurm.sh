#!/bin/bash
#SBATCH --job-name=step35-sft
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# The authors' fine-tuning on 64 GPUs under Slurm: EXAMPLES=$PWD/examples sbatch examples/sft_slurm.sh
# (Slurm runs a copy of this file). What the arguments mean is in sft_arguments.sh.
set -euo pipefail
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")}/sft_arguments.sh"

# Job and nodes, as sbatch sets them.
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes 8 --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$HEAD:29500" \
    "$MEGATRON_LM/pretrain_gpt.py" "${ARGUMENTS[@]}"
