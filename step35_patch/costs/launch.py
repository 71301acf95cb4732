"""How a run is laid out: Megatron's arguments that costs depend on, and which layers are where.

A `Launch` has them under Megatron's own names. `from_arguments` reads one from Megatron's parsed
arguments, validated or not; `stages` says which layers stand on which pipeline stage, as
Megatron-Core divides them. Nothing here needs torch, but for a custom pipeline layout: that is
read by Megatron-Core's own parser.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from step35_patch.config.layer_plan import LayerPlan
from step35_patch.config.model import Step35Config, Window
from step35_patch.config.problem import Problem
from step35_patch.costs.launch_errors import LaunchError
from step35_patch.costs.pipeline_letters import layers_of_stages, virtual_size_of
from step35_patch.settings import GateLayout

__all__ = [
    "DTYPE_BYTES",
    "Launch",
    "LaunchError",
    "Problem",
    "Stage",
    "from_arguments",
    "layer_plans",
    "stages",
    "virtual_size_of",
]

# Of all of Megatron's names for an element's type that costs meet, by its bytes.
DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
_DTYPES_OF_TORCH = {
    "torch.float32": "fp32",
    "torch.float16": "fp16",
    "torch.bfloat16": "bf16",
    "torch.uint8": "fp8",
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Megatron's arguments, as far as memory, operations and messages depend on them.

    The names are those of Megatron's parsed arguments, and of TransformerConfig where those have
    none. Types of elements are Megatron's words for them: "fp32", "bf16", "fp16", "fp8".

    Attributes:
        num_layers: Of the decoder, without MTP layers.
        mtp_num_layers: How many MTP layers are trained; 0 for none.
        padded_vocab_size: Rows of the embedding and of an output matrix.
        gate_layout: "headwise" or "expanded".
        window: Convention of the sliding layers.
        world_size: How many GPUs.
        virtual_pipeline_model_parallel_size: None without virtual stages.
        pipeline_model_parallel_layout: In Megatron's letters, or None.
        microbatch_group_size_per_vp_stage: None for the pipeline-parallel size.
        expert_tensor_parallel_size: Tensor-parallel size of the routed experts.
        precision: Of weights and activations: "bf16", "fp16" or "fp32".
        optimizer: As on the command line: "adam", "muon", "dist_muon", ...
        use_distributed_optimizer: As on the command line, so that with "muon" it is the layer-wise
            distributed optimizer.
        accumulate_allreduce_grads_in_fp32: Whether the buffer of gradients is fp32.
        store_param_remainders: Of OptimizerConfig: with the precision-aware optimizer, whether of
            fp32 weights only the half is stored that the bf16 ones lack.
        recompute_modules: With the granularity "selective"; empty otherwise.
        recompute_num_layers: With the granularity "full".
    """

    num_layers: int
    padded_vocab_size: int
    mtp_num_layers: int = 0
    gate_layout: GateLayout = "headwise"
    window: Window = "hf"

    world_size: int = 1
    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    pipeline_model_parallel_layout: str | None = None
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    microbatch_group_size_per_vp_stage: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1

    seq_length: int = 4096
    micro_batch_size: int = 1
    global_batch_size: int = 1

    transformer_impl: str = "transformer_engine"
    bias_swiglu_fusion: bool = True
    cross_entropy_loss_fusion: bool = False
    cross_entropy_fusion_impl: str = "native"
    precision: str = "bf16"
    optimizer: str = "adam"
    use_distributed_optimizer: bool = False
    use_precision_aware_optimizer: bool = False
    accumulate_allreduce_grads_in_fp32: bool = True
    main_grads_dtype: str = "fp32"
    main_params_dtype: str = "fp32"
    exp_avg_dtype: str = "fp32"
    exp_avg_sq_dtype: str = "fp32"
    store_param_remainders: bool = True

    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    recompute_modules: tuple[str, ...] = ()

    @property
    def data_parallel_size(self) -> int:
        """Ranks that train on samples of their own."""
        return self.world_size // (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def expert_data_parallel_size(self) -> int:
        """Ranks that hold the same routed experts' weights."""
        return self.world_size // (
            self.expert_tensor_parallel_size
            * self.expert_model_parallel_size
            * self.pipeline_model_parallel_size
        )

    @property
    def dense_data_parallel_size(self) -> int:
        """Ranks that hold the same of all other weights: context parallelism's too."""
        return self.data_parallel_size * self.context_parallel_size

    @property
    def is_distributed(self) -> bool:
        """Whether data-parallel ranks share out the optimizer's state."""
        return self.use_distributed_optimizer or self.optimizer == "dist_muon"

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of a step on each data-parallel rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    @property
    def tokens_of_microbatch(self) -> int:
        """Tokens of a micro-batch that a context-parallel rank has."""
        return self.micro_batch_size * self.seq_length // self.context_parallel_size


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one pipeline stage, or one virtual stage of it, has of the model.

    Attributes:
        pp: Pipeline rank.
        vpp: Virtual stage on that rank; 0 without virtual stages.
        decoder_layers: Absolute 0-based indices.
        mtp_layers: The same; they count on from the decoder's.
        embedding: Whether the model begins on it. A stage with MTP layers has a copy besides.
        output: Whether it has the output layer and the loss, and the MTP layers' output matrices,
            wherever those are.
    """

    pp: int
    vpp: int = 0
    decoder_layers: tuple[int, ...] = ()
    mtp_layers: tuple[int, ...] = ()
    embedding: bool = False
    output: bool = False

    @property
    def layers(self) -> tuple[int, ...]:
        """Absolute indices of all of them."""
        return self.decoder_layers + self.mtp_layers


@lru_cache(maxsize=8)  # they are asked for layer by layer
def layer_plans(config: Step35Config, window: Window) -> tuple[LayerPlan, ...]:
    """The plan of each layer: `Step35Config.resolve`."""
    return config.resolve(window)


def stages(launch: Launch) -> list[Stage]:
    """All stages in the order in which a token goes through them, as Megatron-Core divides them.

    Raises:
        LaunchError: The layers cannot be divided so.
    """
    if launch.pipeline_model_parallel_layout is not None:
        parts = layers_of_stages(
            launch.pipeline_model_parallel_layout,
            launch.pipeline_model_parallel_size,
            launch.num_layers,
            launch.mtp_num_layers,
        )
    else:
        parts = list(_even_parts(launch))
    size, first, found = launch.pipeline_model_parallel_size, 0, []
    for number, (decoder, mtp) in enumerate(parts):
        found.append(
            Stage(
                pp=number % size,
                vpp=number // size,
                decoder_layers=tuple(range(first, first + decoder)),
                mtp_layers=tuple(range(launch.num_layers, launch.num_layers + mtp)),
                embedding=number == 0,
                output=number == len(parts) - 1,
            )
        )
        first += decoder
    return found


def _even_parts(launch: Launch) -> Iterator[tuple[int, int]]:
    """How many decoder and MTP layers each stage has, of `get_num_layers_to_build`."""
    size = launch.pipeline_model_parallel_size
    chunks = launch.virtual_pipeline_model_parallel_size or 1
    if size * chunks > launch.num_layers + 2:  # embedding and loss may be stages too
        raise LaunchError(
            [
                Problem(
                    "--pipeline-model-parallel-size",
                    f"at most {launch.num_layers + 2} stages",
                    f"{size} x {chunks}",
                    "use fewer, or --pipeline-model-parallel-layout",
                )
            ]
        )
    embedding = int(launch.account_for_embedding_in_pipeline_split)
    loss = int(launch.account_for_loss_in_pipeline_split)
    by_rank: list[int | None] = [None] * size
    if launch.decoder_first_pipeline_num_layers is not None:
        by_rank[0] = launch.decoder_first_pipeline_num_layers
    if launch.decoder_last_pipeline_num_layers is not None:
        by_rank[-1] = launch.decoder_last_pipeline_num_layers
    uneven = by_rank.count(None) < size
    if uneven and (embedding or loss):
        raise LaunchError(
            [
                Problem(
                    "--account-for-embedding-in-pipeline-split, --account-for-loss-in-...",
                    "none with --decoder-first-pipeline-num-layers or --decoder-last-...",
                    "both",
                    "leave out the ones or the others",
                )
            ]
        )
    left = launch.num_layers + embedding + loss - sum(count or 0 for count in by_rank)
    others = by_rank.count(None)
    if left < 0 or (left % others if others else left):
        raise LaunchError([_undivided(launch, left, others, uneven=uneven)])
    counts = [left // others if count is None else count for count in by_rank]
    if any(count % chunks for count in counts):
        raise LaunchError(
            [
                Problem(
                    "--num-virtual-stages-per-pipeline-rank",
                    f"a divisor of the layers on each pipeline rank ({_words(counts)})",
                    f"{chunks}",
                    "choose one, or a --pipeline-model-parallel-layout",
                )
            ]
        )
    for chunk in range(chunks):
        for rank, count in enumerate(counts):
            is_first = chunk == rank == 0
            is_last = (chunk, rank) == (chunks - 1, size - 1)
            decoder = count // chunks - embedding * is_first - loss * is_last
            if decoder < 0:
                raise LaunchError(
                    [
                        Problem(
                            "--account-for-embedding-in-pipeline-split"
                            if is_first
                            else "--account-for-loss-in-pipeline-split",
                            "a layer to leave out on that stage",
                            "none",
                            "use fewer stages",
                        )
                    ]
                )
            yield decoder, launch.mtp_num_layers if is_last else 0


def _undivided(launch: Launch, left: int, others: int, *, uneven: bool) -> Problem:
    size = launch.pipeline_model_parallel_size
    if uneven:
        return Problem(
            "--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers",
            f"counts that leave a multiple of {others} of the {launch.num_layers} layers to the "
            f"other {others} stages"
            if others
            else f"{launch.num_layers} in sum",
            f"{left} left over",
            "change them, or use --pipeline-model-parallel-layout",
        )
    return Problem(
        "--pipeline-model-parallel-size",
        f"a divisor of {left} layers",
        f"{size}",
        "choose one, or say which layers are where with --pipeline-model-parallel-layout",
    )


def _words(counts: list[int]) -> str:
    return ", ".join(map(str, sorted(set(counts))))


def fewest_ranks(
    *, tensor: int, pipeline: int, context: int, expert: int, expert_tensor: int
) -> int:
    """The smallest number of ranks that has these parallel sizes; all others are multiples."""
    return pipeline * math.lcm(tensor * context, expert * expert_tensor)


def from_arguments(args: Any) -> Launch:
    """The launch that Megatron's arguments describe.

    Args:
        args: Parsed, with the shapes of the config filled in (as `step35_patch` does in
            `parse_args`); validated or not.

    Raises:
        LaunchError: Virtual stages are asked for in a way that does not divide the layers, or the
            pipeline layout cannot be read.
    """
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    main_grads = _dtype(args.main_grads_dtype)
    granularity = args.recompute_granularity
    # Deleted when the arguments are validated.
    if getattr(args, "recompute_activations", False):
        granularity = "selective"
    tensor = args.tensor_model_parallel_size
    layer_wise = getattr(args, "use_layer_wise_distributed_optimizer", False)
    return Launch(
        num_layers=args.num_layers,
        padded_vocab_size=args.padded_vocab_size,
        mtp_num_layers=args.mtp_num_layers or 0,
        # Without a config of their own, the arguments have neither.
        gate_layout=getattr(args, "step35_gate_layout", "headwise"),
        window=getattr(args, "step35_window", "hf"),
        world_size=args.world_size,
        tensor_model_parallel_size=tensor,
        sequence_parallel=args.sequence_parallel and tensor > 1,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=_virtual_size(args),
        pipeline_model_parallel_layout=args.pipeline_model_parallel_layout,
        decoder_first_pipeline_num_layers=args.decoder_first_pipeline_num_layers,
        decoder_last_pipeline_num_layers=args.decoder_last_pipeline_num_layers,
        account_for_embedding_in_pipeline_split=args.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=args.account_for_loss_in_pipeline_split,
        microbatch_group_size_per_vp_stage=args.microbatch_group_size_per_vp_stage,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size or tensor,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=args.global_batch_size or args.micro_batch_size * _data_parallel(args),
        transformer_impl=args.transformer_impl,
        bias_swiglu_fusion=args.bias_swiglu_fusion,
        cross_entropy_loss_fusion=args.cross_entropy_loss_fusion,
        cross_entropy_fusion_impl=args.cross_entropy_fusion_impl,
        precision=precision,
        optimizer=args.optimizer,
        use_distributed_optimizer=args.use_distributed_optimizer or layer_wise,
        use_precision_aware_optimizer=args.use_precision_aware_optimizer,
        accumulate_allreduce_grads_in_fp32=_grads_in_fp32(args, precision, main_grads),
        main_grads_dtype=main_grads,
        main_params_dtype=_dtype(args.main_params_dtype),
        exp_avg_dtype=_dtype(args.exp_avg_dtype),
        exp_avg_sq_dtype=_dtype(args.exp_avg_sq_dtype),
        store_param_remainders=getattr(args, "store_param_remainders", True),
        recompute_granularity=granularity,
        recompute_method=args.recompute_method,
        recompute_num_layers=args.recompute_num_layers,
        recompute_modules=tuple(args.recompute_modules or ["core_attn"])
        if granularity == "selective"
        else (),
    )


def _dtype(found: object) -> str:
    """Megatron's word, which validation has replaced by torch's type."""
    return _DTYPES_OF_TORCH.get(str(found), str(found))


def _data_parallel(args: Any) -> int:
    size: int = args.world_size // (
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * args.context_parallel_size
    )
    return max(size, 1)


def _grads_in_fp32(args: Any, precision: str, main_grads: str) -> bool:
    """`accumulate_allreduce_grads_in_fp32` as validation leaves it."""
    if precision == "bf16":
        if args.grad_reduce_in_bf16:
            return False
        return bool(args.accumulate_allreduce_grads_in_fp32 or main_grads == "fp32")
    return bool(precision == "fp32" or args.accumulate_allreduce_grads_in_fp32)


def _virtual_size(args: Any) -> int | None:
    """`virtual_pipeline_model_parallel_size`, which only validation sets."""
    size, pipeline = None, args.pipeline_model_parallel_size
    if args.pipeline_model_parallel_layout is not None:
        return virtual_size_of(args.pipeline_model_parallel_layout, pipeline)
    if args.num_virtual_stages_per_pipeline_rank is not None:
        size = args.num_virtual_stages_per_pipeline_rank
    elif args.num_layers_per_virtual_pipeline_stage is not None:
        layers = (
            args.num_layers
            + args.account_for_embedding_in_pipeline_split
            + args.account_for_loss_in_pipeline_split
        )
        per_stage = args.num_layers_per_virtual_pipeline_stage
        if layers % (pipeline * per_stage):
            raise LaunchError(
                [
                    Problem(
                        "--num-layers-per-virtual-pipeline-stage",
                        f"a divisor of {layers} layers / {pipeline} pipeline ranks",
                        f"{per_stage}",
                        "use --num-virtual-stages-per-pipeline-rank, or a layout",
                    )
                ]
            )
        size = layers // (pipeline * per_stage)
    return None if size in (None, 1) else size
