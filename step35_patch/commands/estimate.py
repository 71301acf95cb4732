"""`step35-patch estimate`: what a parallel layout costs, in memory, operations and bytes sent."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NoReturn

from step35_patch.commands.config_argument import add_config_argument, read_config
from step35_patch.settings import GATE_LAYOUTS, WINDOWS

if TYPE_CHECKING:
    from step35_patch.config.model import Step35Config
    from step35_patch.costs.estimate import Estimate, RankEstimate
    from step35_patch.costs.launch import Launch
    from step35_patch.costs.search import Found

GIB = 2**30
# What --recompute may be besides modules of selective recomputation, with or without ":N".
_FULL = {"full": "uniform", "uniform": "uniform", "block": "block"}
# Options that --search decides.
_OF_LAYOUT = (
    *("tp", "pp", "vpp", "cp", "ep", "etp", "gpus", "pipeline_layout"),
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
)
_DTYPES = ("fp32", "fp16", "bf16", "fp8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `step35-patch estimate`."""
    parser.epilog = f"docs/estimate.md says what is counted, and how. {parser.epilog}"
    add_config_argument(parser)
    _add_layout(parser.add_argument_group("layout"))
    _add_run(parser.add_argument_group("batch, precision, optimizer"))
    parser.add_argument(
        "--gpu-memory",
        type=_positive,
        metavar="GIB",
        help="of a GPU; a layout that needs more gives exit status 1",
    )
    parser.add_argument(
        "--search",
        type=int,
        metavar="GPUS",
        help="list the layouts that fit on so many GPUs of --gpu-memory, best first",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="list no more than so many")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run)


def _positive(text: str) -> float:
    """A finite number above 0.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text!r}")
    return number


def _add_layout(group: Any) -> None:
    for option, words in {
        "--tp": "tensor-parallel size; more than 1 brings sequence parallelism",
        "--pp": "pipeline-parallel size",
        "--vpp": "virtual stages on each pipeline rank",
        "--cp": "context-parallel size",
        "--ep": "expert-parallel size",
    }.items():
        group.add_argument(option, type=int, metavar="N", help=f"{words} (default: 1)")
    group.add_argument(
        "--etp",
        type=int,
        metavar="N",
        help="expert-tensor-parallel size (default: --tp, as in Megatron)",
    )
    group.add_argument(
        "--gpus", type=int, metavar="N", help="how many (default: as few as the sizes need)"
    )
    group.add_argument(
        "--pipeline-layout",
        metavar="LAYOUT",
        help="Megatron's --pipeline-model-parallel-layout, such as 'Ett|(tt|)*21t|mmmL'",
    )
    for place in ("first", "last"):
        group.add_argument(
            f"--decoder-{place}-pipeline-num-layers",
            type=int,
            metavar="N",
            help=f"decoder layers on the {place} pipeline rank",
        )
    for place in ("embedding", "loss"):
        group.add_argument(
            f"--account-for-{place}-in-pipeline-split",
            action="store_true",
            help=f"count the {place} as a layer",
        )


def _add_run(group: Any) -> None:
    group.add_argument(
        "--seq-length", type=int, default=4096, metavar="N", help="(default: %(default)s)"
    )
    group.add_argument(
        "--micro-batch-size", type=int, default=1, metavar="N", help="(default: %(default)s)"
    )
    group.add_argument(
        "--global-batch-size",
        type=int,
        metavar="N",
        help="(default: as many micro-batches on each data-parallel rank as fill the pipeline)",
    )
    group.add_argument(
        "--precision",
        choices=("bf16", "fp16", "fp32"),
        default="bf16",
        help="of weights and activations (default: %(default)s)",
    )
    group.add_argument(
        "--optimizer",
        choices=("adam", "muon", "sgd", "lion"),
        default="adam",
        help="(default: %(default)s)",
    )
    group.add_argument(
        "--use-distributed-optimizer",
        action="store_true",
        help="its state is shared out over data- and context-parallel ranks",
    )
    group.add_argument(
        "--use-precision-aware-optimizer", action="store_true", help="with these types:"
    )
    for name in ("main-grads", "main-params", "exp-avg", "exp-avg-sq"):
        group.add_argument(f"--{name}-dtype", choices=_DTYPES, default="fp32", metavar="TYPE")
    group.add_argument(
        "--grad-reduce-in-bf16", action="store_true", help="gradients are bf16, not fp32"
    )
    group.add_argument(
        "--recompute",
        default="none",
        metavar="WHAT",
        help="none, full (each layer alone), uniform:N, block:N, or modules of "
        "--recompute-modules with commas: core_attn,mlp,moe,... (default: %(default)s)",
    )
    group.add_argument(
        "--cross-entropy-fusion-impl",
        choices=("te",),
        help="with --cross-entropy-loss-fusion: keeps logits in place of their softmax in fp32",
    )
    group.add_argument(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        default="transformer_engine",
        help="whose activations; of local, those on a CPU (default: %(default)s)",
    )
    group.add_argument("--mtp-num-layers", type=int, metavar="N", help="(default: the config's)")
    group.add_argument(
        "--padded-vocab-size", type=int, metavar="N", help="(default: the config's vocab_size)"
    )
    group.add_argument(
        "--gate-layout", choices=GATE_LAYOUTS, default="headwise", help="(default: %(default)s)"
    )
    group.add_argument("--window", choices=WINDOWS, default="hf", help="(default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Print the report; returns the exit status.

    Raises:
        SystemExit: Wrong usage (status 2).
    """
    from step35_patch.costs.estimate import estimate
    from step35_patch.costs.launch import LaunchError

    config = read_config(options)
    if config is None:
        return 2
    launch = launch_of(options, config)
    if options.search is not None:
        return _search(options, config, launch)
    try:
        found = estimate(config, launch)
    except LaunchError as error:
        print(f"{options.config}: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(as_json(found, options.gpu_memory), indent=1))
    else:
        from step35_patch.commands.estimate_text import print_estimate

        print_estimate(found, options.gpu_memory)
    if options.gpu_memory is not None and found.memory > options.gpu_memory * GIB:
        return 1
    return 0


def _wrong(text: str) -> NoReturn:
    print(f"step35-patch estimate: error: {text}", file=sys.stderr)
    raise SystemExit(2)


def launch_of(options: argparse.Namespace, config: Step35Config) -> Launch:
    """What the command's options ask for.

    Raises:
        SystemExit: A value that is none (status 2).
    """
    from step35_patch.costs.launch import Launch, LaunchError, fewest_ranks, virtual_size_of

    numbers = {
        name: value
        for name, value in vars(options).items()
        if isinstance(value, int) and not isinstance(value, bool)
    }
    for name, value in numbers.items():
        if value < (0 if name == "mtp_num_layers" else 1):
            _wrong(f"--{name.replace('_', '-')}: expected a positive number, found {value}")
    tp, pp, cp, ep = options.tp or 1, options.pp or 1, options.cp or 1, options.ep or 1
    etp = options.etp or tp
    gpus = options.gpus or fewest_ranks(
        tensor=tp, pipeline=pp, context=cp, expert=ep, expert_tensor=etp
    )
    virtual = None if options.vpp == 1 else options.vpp
    if options.pipeline_layout is not None:
        try:
            given, virtual = virtual, virtual_size_of(options.pipeline_layout, pp)
        except LaunchError as error:
            _wrong(f"--pipeline-layout: {error}")
        if given not in (None, virtual):
            _wrong(f"--vpp: expected {virtual or 1} with this --pipeline-layout, found {given}")
    data = max(gpus // (tp * pp * cp), 1)
    mtp = options.mtp_num_layers
    return Launch(
        num_layers=config.num_hidden_layers,
        padded_vocab_size=options.padded_vocab_size or config.vocab_size,
        mtp_num_layers=config.num_nextn_predict_layers if mtp is None else mtp,
        gate_layout=options.gate_layout,
        window=options.window,
        world_size=gpus,
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_model_parallel_layout=options.pipeline_layout,
        decoder_first_pipeline_num_layers=options.decoder_first_pipeline_num_layers,
        decoder_last_pipeline_num_layers=options.decoder_last_pipeline_num_layers,
        account_for_embedding_in_pipeline_split=options.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=options.account_for_loss_in_pipeline_split,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        seq_length=options.seq_length,
        micro_batch_size=options.micro_batch_size,
        global_batch_size=options.global_batch_size or data * options.micro_batch_size * pp,
        transformer_impl=options.transformer_impl,
        # The local implementation is counted as it runs on a CPU.
        bias_swiglu_fusion=options.transformer_impl != "local",
        cross_entropy_loss_fusion=options.cross_entropy_fusion_impl is not None,
        cross_entropy_fusion_impl=options.cross_entropy_fusion_impl or "native",
        precision=options.precision,
        optimizer=options.optimizer,
        use_distributed_optimizer=options.use_distributed_optimizer,
        use_precision_aware_optimizer=options.use_precision_aware_optimizer,
        accumulate_allreduce_grads_in_fp32=not options.grad_reduce_in_bf16
        and options.main_grads_dtype == "fp32",
        main_grads_dtype=options.main_grads_dtype,
        main_params_dtype=options.main_params_dtype,
        exp_avg_dtype=options.exp_avg_dtype,
        exp_avg_sq_dtype=options.exp_avg_sq_dtype,
        **_recomputation(options.recompute),
    )


def _recomputation(text: str) -> dict[str, Any]:
    """The fields of a Launch that --recompute stands for."""
    method, _, number = text.partition(":")
    if text == "none":
        return {}
    if method in _FULL:
        if number and not (number.isdecimal() and int(number)):
            _wrong(f"--recompute: expected a positive number behind {method}:, found {number!r}")
        return {
            "recompute_granularity": "full",
            "recompute_method": _FULL[method],
            "recompute_num_layers": int(number or 1),
        }
    return {
        "recompute_granularity": "selective",
        "recompute_modules": tuple(text.split(",")),
    }


def as_json(found: Estimate, gpu_memory: float | None) -> dict[str, Any]:
    """Everything as one object; the keys named in docs/estimate.md do not change."""
    flops = {part: round(count) for part, count in found.flops_per_token.items()}
    return {
        "total_parameters": found.total_parameters,
        "buffer_elements": found.router_biases,  # the routers' biases
        "ranks": [_rank_json(rank) for rank in found.ranks],
        "flops_per_token": {"total": round(sum(found.flops_per_token.values())), **flops},
        "memory": found.memory,
        "gpu_memory": None if gpu_memory is None else round(gpu_memory * GIB),
        "launch": asdict(found.launch),
    }


def _rank_json(rank: RankEstimate) -> dict[str, Any]:
    return {
        # All tensor- and expert-parallel ranks of a stage hold as much.
        "pp": rank.pp,
        "tp": 0,
        "ep": 0,
        "parameters": rank.parameters.total,
        "expert_parameters": rank.parameters.expert,
        "bytes": {
            "weights": rank.weights,
            "gradients": rank.gradients,
            "optimizer": rank.optimizer,
            "activations": rank.activations,
        },
        "memory": rank.memory,
        "micro_batches_in_flight": round(rank.micro_batches, 3),
        "bytes_sent": {kind: round(sent) for kind, sent in rank.sent._asdict().items()},
        "stages": [
            {
                "vpp": stage.vpp,
                "layers": list(stage.layers),
                "embedding": stage.embedding or bool(stage.mtp_layers),
                "output": stage.output,
            }
            for stage in rank.stages
        ],
    }


def _search(options: argparse.Namespace, config: Step35Config, launch: Launch) -> int:
    from step35_patch.costs.search import search

    if options.gpu_memory is None:
        _wrong("--search: expected --gpu-memory with it, found none")
    for name in _OF_LAYOUT:
        if getattr(options, name):
            _wrong(f"--{name.replace('_', '-')}: expected none with --search, which tries them all")
    if options.global_batch_size is None:
        launch = replace(launch, global_batch_size=options.search * options.micro_batch_size)
    limit = int(options.gpu_memory * GIB)
    fitting = search(config, launch, gpus=options.search, memory=limit)
    if options.json:
        print(json.dumps({"layouts": [_found_json(one) for one in fitting]}, indent=1))
    else:
        from step35_patch.commands.estimate_text import print_search

        print_search(fitting, options.search, options.gpu_memory, options.limit)
    return 0 if fitting else 1


def _found_json(one: Found) -> dict[str, Any]:
    launch = one.launch
    return {
        "tp": launch.tensor_model_parallel_size,
        "pp": launch.pipeline_model_parallel_size,
        "vpp": launch.virtual_pipeline_model_parallel_size or 1,
        "cp": launch.context_parallel_size,
        "ep": launch.expert_model_parallel_size,
        "etp": launch.expert_tensor_parallel_size,
        "dp": launch.data_parallel_size,
        "pipeline_layout": launch.pipeline_model_parallel_layout,
        "needs": list(one.needs),
        "memory": one.memory,
        "score": one.score,
    }
