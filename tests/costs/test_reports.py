"""Megatron's printed numbers, from its own arguments: against Megatron's count for a model that it
counts rightly, against the ranks of really built models, and by hand.

Run as a script, it is one process that plays all ranks in turn, on torch's fake process group.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.layout_runs import layout_config
from support.reference import FULL, tiny_config

import step35_patch
from step35_patch import Step35Config, cpu, settings
from step35_patch.config import packaged_config_path
from step35_patch.costs import megatron_reports as reports
from step35_patch.costs.accounting import Parameters, layer_activation_bytes, training_flops
from step35_patch.model.description import from_settings

pytestmark = pytest.mark.megatron

LENGTH = 64
FULL_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def parse(config: Path, words: str = "", world_size: int = 1):
    """Megatron's arguments, parsed and validated with a config active."""
    from megatron.training.arguments import parse_args, validate_args

    step35_patch.activate()  # forgets the gate layout and window of the last one
    before = sys.argv, os.environ.get("WORLD_SIZE")
    sys.argv = ["pretrain_gpt.py", "--step35-config", str(config), *words.split()]
    sys.argv += f"""--seq-length {LENGTH} --micro-batch-size 1 --train-iters 1 --lr 1e-3 --mock-data
        --transformer-impl local --tokenizer-type NullTokenizer --no-persist-layer-norm
        --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-rope-fusion
        --use-cpu-initialization""".split()
    os.environ["WORLD_SIZE"] = str(world_size)
    try:
        args = parse_args()
        validate_args(args)
    finally:
        sys.argv = before[0]
        os.environ.pop("WORLD_SIZE")
        if before[1] is not None:
            os.environ["WORLD_SIZE"] = before[1]
    return args


@pytest.fixture
def arguments(tmp_path):
    def write_and_parse(config: dict | Path, words: str = "", world_size: int = 1):
        if isinstance(config, dict):
            (tmp_path / "config.json").write_text(json.dumps(config))
            config = tmp_path / "config.json"
        return parse(config, words, world_size)

    yield write_and_parse
    step35_patch.activate()


# --- Operations ---------------------------------------------------------------------------------


def plain_config(**changes) -> dict:
    """A model without what Megatron doesn't know: one kind of attention, and no gate."""
    plain = {
        "layer_types": [FULL] * 8,
        "rope_theta": 50.0,
        "partial_rotary_factors": None,
        "use_head_wise_attn_gate": False,
        "moe_layers_enum": "1,3",
    }
    return tiny_config(**(plain | changes))


def test_operations_are_megatrons_own_for_a_plain_model(arguments):
    """But for the routers, which Megatron leaves out, and the MTP norms, which it takes in."""
    from megatron.training import training

    args = arguments(plain_config())
    ours = training.num_floating_point_operations(args, 4)
    step35_patch.activate()  # inert
    stock = training.num_floating_point_operations(args, 4)
    routers, norms = 2 * 32 * 4, 2 * 3 * 32
    assert ours - stock == 6 * 4 * LENGTH * (routers - norms)


def test_operations_of_packed_sequences(arguments):
    """As those of a batch of sequences of that length without padding."""
    from megatron.training import training

    if (
        "seqlen_squared_sum_in_batch"
        not in inspect.signature(training.num_floating_point_operations).parameters
    ):
        pytest.skip("this Megatron-Core does not count packed sequences apart")
    args = arguments(tiny_config())
    sequences = 12  # of 16 tokens; the rest of the batch is padding
    packed = training.num_floating_point_operations(
        args,
        4,
        seqlen_squared_sum_in_batch=sequences * 16.0**2,
        total_real_tokens_in_batch=sequences * 16.0,
    )
    args.seq_length = 16
    assert packed == training.num_floating_point_operations(args, sequences)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("--step35-gate-layout expanded", {}),  # the other rows are redundant work
        ("--step35-window steptron", {"window": "steptron"}),
        ("--mtp-num-layers 1", {"mtp_layers": 1}),
        ("--padded-vocab-size 128", {"vocab_size": 128}),
    ],
)
def test_operations_follow_the_arguments(arguments, words, changes):
    from megatron.training import training

    args = arguments(tiny_config(), words)
    size = {"vocab_size": 96, "mtp_layers": 2} | changes
    config = Step35Config.from_dict(tiny_config())
    expected = training_flops(config, tokens=4 * LENGTH, squared_lengths=4 * LENGTH**2, **size)
    assert training.num_floating_point_operations(args, 4) == expected


# --- Parameters ---------------------------------------------------------------------------------

# Arguments: (ranks, micro-batches of the schedule that is looked at)
LAYOUTS = {
    "--tensor-model-parallel-size 2 --sequence-parallel": (2, 1),
    "--tensor-model-parallel-size 4 --sequence-parallel --expert-model-parallel-size 2 "
    "--expert-tensor-parallel-size 1 --step35-gate-layout expanded": (4, 1),
    "--pipeline-model-parallel-size 2 --mtp-num-layers 1": (2, 1),
    "--pipeline-model-parallel-size 3": (3, 8),
    "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3": (2, 8),
    "--pipeline-model-parallel-size 3 --num-virtual-stages-per-pipeline-rank 2": (3, 2),
    "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 4 "
    "--decoder-last-pipeline-num-layers 2": (2, 1),
    # MTP layers away from the output layer; virtual stages of unequal length.
    "--pipeline-model-parallel-size 3 --pipeline-model-parallel-layout Ettt|tttmm|L": (3, 1),
    "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|tt|t|ttmmL": (2, 4),
}


def build_rank(args, rank: int) -> tuple[int, Parameters]:
    """A rank's pipeline stage, and its parameters, as Megatron-Core builds it."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.training.arguments import core_transformer_config_from_args
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from step35_patch.model.mtp import embedding_ranks

    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=args.world_size
    )
    virtual = args.virtual_pipeline_model_parallel_size
    config = core_transformer_config_from_args(args)
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        virtual,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
        get_embedding_ranks=lambda pp_ranks, *_: embedding_ranks(pp_ranks, config),
    )
    model_parallel_cuda_manual_seed(1)
    found = Parameters()
    for vp_stage in [None] if virtual is None else range(virtual):
        how = {"use_transformer_engine": False, "vp_stage": vp_stage}
        spec = gpt_layer_specs.get_gpt_decoder_block_spec(config, **how, normalization="RMSNorm")
        at = {"ignore_virtual": False, "vp_stage": vp_stage}
        model = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            mtp_block_spec=gpt_layer_specs.get_gpt_mtp_block_spec(
                config, gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm"), **how
            ),
            vocab_size=args.padded_vocab_size,
            max_sequence_length=LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(**at),
            post_process=parallel_state.is_pipeline_last_stage(**at),
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        for name, parameter in model.named_parameters():
            kind = "expert" if ".experts." in name else "dense"
            found += Parameters(**{kind: parameter.numel()})
    return parallel_state.get_pipeline_model_parallel_rank(), found


def chunks_held(args, num_microbatches: int) -> float:
    """Micro-batches that Megatron-Core's schedule has in flight on this rank, at most."""
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    chunks = args.virtual_pipeline_model_parallel_size or 1
    total, _, warmup, _ = get_pp_rank_microbatches(
        num_microbatches, chunks, args.pipeline_model_parallel_size
    )
    return min(warmup + 1, total) / chunks


def play_all_ranks(config: Path) -> None:
    """Print of each layout what is reported and, by rank, what was built, in JSON."""
    from megatron.core import parallel_state

    for words, (world_size, num_microbatches) in LAYOUTS.items():
        args = parse(config, words, world_size)
        runtime = from_settings(settings.active())
        reported = [
            [p.dense, p.expert] for p in reports.rank_parameters(runtime, args)
        ]  # before there are groups
        built, held = [], {}
        for rank in range(world_size):
            stage, found = build_rank(args, rank)
            built.append([stage, [found.dense, found.expert]])
            held[stage] = f"{chunks_held(args, num_microbatches):.2f}"
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()
        print("layout", json.dumps([words, reported, built]))
        reports.compute_activation_memory(runtime, args, num_microbatches, verbose=True)
        print("schedule", json.dumps([words, [held[stage] for stage in sorted(held)]]))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> str:
    """The output of `play_all_ranks`; in a process of its own, for its process groups."""
    config = tmp_path_factory.mktemp("ranks") / "config.json"
    config.write_text(json.dumps(layout_config()))
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]
        ),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, __file__, str(config)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=900, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize("words", LAYOUTS)
def test_parameters_are_those_of_every_built_rank(ranks, words):
    lines = [json.loads(line) for line in re.findall(r"^layout (.*)", ranks, re.MULTILINE)]
    [(reported, built)] = [line[1:] for line in lines if line[0] == words]
    assert len(built) == LAYOUTS[words][0]
    assert {stage for stage, _ in built} == set(range(len(reported)))
    for stage, found in built:
        assert reported[stage] == found, stage


@pytest.mark.parametrize("words", LAYOUTS)
def test_micro_batches_in_flight_are_those_of_the_schedule(ranks, words):
    [(text, held)] = re.findall(
        rf"^layout \[\"{re.escape(words)}\".*?\n(.*?)^schedule (.*?)$",
        ranks,
        re.MULTILINE | re.DOTALL,
    )
    printed = re.findall(r"pipeline stage \d: (\S+) micro-batches in flight", text)
    assert printed == json.loads(held)[1]


def test_the_published_models_size_is_printed(arguments, capsys):
    from megatron.training import theoretical_memory_usage as memory

    def printed(words: str) -> dict[str, str]:
        args = arguments(packaged_config_path(), words)
        memory.compute_weight_and_optimizer_memory(args, verbose=True)
        return dict(re.findall(r"^(.*) in billions: *(\S+)", capsys.readouterr().out, re.M))

    assert printed("")["Total number of parameters"] == "199.38"
    assert printed("--step35-gate-layout expanded")["Total number of parameters"] == "201.58"
    # Two of the three MTP layers less, of 0.81 each; 280 of 288 experts idle, 184.97.
    assert printed("--mtp-num-layers 1") == {
        "Number of parameters in transformer block": "195.90",
        "Number of active parameters in transformer block": "10.93",
        "Number of parameters in mtp block": "0.28",  # attention 0.11, FFN 0.14, eh_proj 0.03
        "Number of parameters in embedding layers": "1.58",  # three of 128896 x 4096
        "Total number of parameters": "197.77",
        "Total number of active parameters": "12.80",
        "Number of parameters in most loaded shard": "197.7655",
    }


# --- Memory -------------------------------------------------------------------------------------

HIDDEN, VOCABULARY = 32, 96
LAYER_INPUT = 2 * LENGTH * HIDDEN
LOGITS = (2 + 4) * LENGTH * VOCABULARY


def activations(args, num_microbatches: int = 8) -> float:
    """Bytes, as Megatron's report has them."""
    from megatron.training.theoretical_memory_usage import report_theoretical_memory

    return report_theoretical_memory(args, num_microbatches)[1] * 1024**2


@pytest.mark.parametrize(
    ("world_size", "words", "dense_ranks", "expert_ranks"),
    [
        (8, "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 4 "
         "--expert-tensor-parallel-size 1", 4, 2),
        (8, "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2 "
         "--no-create-attention-mask-in-dataloader", 4, 4),
        (4, "--expert-model-parallel-size 2", 4, 2),
    ],
)  # fmt: skip
def test_the_distributed_optimizers_state_is_shared(
    arguments, world_size, words, dense_ranks, expert_ranks
):
    from megatron.training import theoretical_memory_usage as memory

    args = arguments(tiny_config(), f"{words} --use-distributed-optimizer", world_size)
    [stage] = reports.rank_parameters(from_settings(settings.active()), args)
    expected = stage.dense * (6 + 12 / dense_ranks) + stage.expert * (6 + 12 / expert_ranks)
    assert memory.compute_weight_and_optimizer_memory(args) == expected


def test_sequence_parallelism_counts_whatever_is_recomputed(arguments):
    """Megatron calls its function "without SP" unless there is selective recomputation."""
    tensor = "--tensor-model-parallel-size 2 --sequence-parallel"
    nothing = activations(arguments(tiny_config(), tensor, 2))
    selective = f"{tensor} --recompute-granularity selective --recompute-modules core_attn"
    assert activations(arguments(tiny_config(), selective, 2)) == nothing
    # The inputs of eight layers, and three sets of logits.
    full = activations(arguments(tiny_config(), f"{tensor} {FULL_RECOMPUTE}", 2))
    assert full == pytest.approx((8 * LAYER_INPUT + 3 * LOGITS) / 2)


def test_layer_inputs_are_whole_without_sequence_parallelism(arguments):
    dense = plain_config(use_moe=False, moe_layers_enum="")
    tensor = "--tensor-model-parallel-size 2"
    full = activations(arguments(dense, f"{tensor} {FULL_RECOMPUTE}", 2))
    assert full == pytest.approx(8 * LAYER_INPUT + 3 * LOGITS / 2)
    split = activations(arguments(dense, f"{tensor} --sequence-parallel", 2))
    # Half of four inputs in each of eight layers, and of five more in the two MTP layers.
    assert activations(arguments(dense, tensor, 2)) - split == pytest.approx(21 * LAYER_INPUT)


def test_experts_split_by_tensor_parallelism_each_get_all_tokens(arguments):
    tensor = "--tensor-model-parallel-size 2 --sequence-parallel"
    split = activations(arguments(tiny_config(), tensor, 2))
    alone = activations(arguments(tiny_config(), f"{tensor} --expert-tensor-parallel-size 1", 2))
    # Half of the inputs of two experts for each token, in the four MoE layers.
    assert split - alone == pytest.approx(4 * 2 * LAYER_INPUT / 2)


@pytest.mark.parametrize(
    ("method", "inputs", "kept"),
    [
        ("--recompute-method uniform --recompute-num-layers 2", 3, []),
        # The first four of the decoder; Megatron-Core leaves MTP layers alone then.
        ("--recompute-method block --recompute-num-layers 4", 4, [4, 5, 6]),
    ],
)
def test_full_recomputation_keeps_what_it_does_not_recompute(arguments, method, inputs, kept):
    # Megatron-Core takes MTP layers with uniform one by one only.
    words = f"--recompute-granularity full {method} --mtp-num-layers 1"
    config = Step35Config.from_dict(tiny_config())
    expected = (inputs if kept else inputs + 1) * LAYER_INPUT + 2 * LOGITS
    expected += sum(layer_activation_bytes(config, config.layers[i], LENGTH) for i in kept)
    assert activations(arguments(tiny_config(), words)) == pytest.approx(expected)


def test_the_most_loaded_stage_is_reported(arguments):
    """Earlier ones keep more micro-batches, the last one the logits of all output matrices."""
    words = f"{FULL_RECOMPUTE} --pipeline-model-parallel-size 3"
    layout = "--pipeline-model-parallel-layout Ettt|tttmm|L"
    args = arguments(tiny_config(), f"{words} {layout}", 3)
    assert activations(args) == pytest.approx(3 * LOGITS)
    args.padded_vocab_size = 0  # so that the stages' layers alone count
    assert activations(args) == pytest.approx(2 * 5 * LAYER_INPUT)
    args = arguments(tiny_config(), f"{words} --mtp-num-layers 1", 3)
    args.padded_vocab_size = 0
    assert activations(args) == pytest.approx(3 * 2 * LAYER_INPUT)
    assert activations(args, num_microbatches=1) == pytest.approx(3 * LAYER_INPUT)


if __name__ == "__main__":
    cpu.install()
    # The stand-in makes Gloo of every group; the fake one has no peers to meet.
    for name in ("init_process_group", "new_group"):
        original = getattr(torch.distributed, name).__wrapped__
        setattr(torch.distributed, name, original)
        setattr(torch.distributed.distributed_c10d, name, original)
    play_all_ranks(Path(sys.argv[1]))


def test_logged_balancing_losses_are_means_over_the_moe_layers(tmp_path):
    """Four of six layers are MoE; the two MTP layers are dense, and Megatron-Core counts them."""
    from megatron.core.transformer.moe import moe_utils
    from support.ours import initialize_megatron

    initialize_megatron()
    name, logged = "load_balancing_loss", {}
    for layer in (3, 4, 5, 6):
        moe_utils.save_to_aux_losses_tracker(name, torch.tensor(0.5), layer, num_layers=8)
    step35_patch.activate(tiny_config())
    try:
        moe_utils.track_moe_metrics(
            loss_scale=1.0,
            iteration=1,
            writer=None,
            total_loss_dict=logged,
            force_initialize=True,
            track_names=[name],
            num_layers=6,
            moe_layer_freq=[0, 0, 1, 1, 1, 1],
            mtp_num_layers=2,
        )
    finally:
        step35_patch.activate()
    assert logged[name].item() == 0.5
