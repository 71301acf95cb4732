"""Megatron's command line with a config: filled in, conflicts listed, what cannot work refused."""

from __future__ import annotations

import argparse
import json
import warnings

import pytest
from support.installed import PUBLISHED
from support.reference import FULL, SLIDING, tiny_config

import step35_patch
from step35_patch import Step35Config, settings
from step35_patch.patch.agreement import (
    Step35MismatchError,
    check_checkpoint,
    check_implementation,
)
from step35_patch.patch.parse_args import Step35ArgumentError, add_arguments

pytestmark = pytest.mark.megatron

# The published model's.
FULL_LAYERS = "0,4,8,12,16,20,24,28,32,36,40,44"
SLIDING_LAYERS = "1-3,5-7,9-11,13-15,17-19,21-23,25-27,29-31,33-35,37-39,41-43,45-47"
FP8 = "--fp8-format hybrid --transformer-impl transformer_engine --tensor-model-parallel-size"


@pytest.mark.parametrize("option", [True, False])
def test_shapes_are_filled_in(parse, option):
    args = parse("--seq-length", "32", config=tiny_config(), option=option)
    expected = {
        "num_layers": 6,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 16,
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": True,
        "qk_layernorm": True,
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": True,
        "padded_vocab_size": 96,
        "num_experts": 4,
        "moe_layer_freq": [0, 0, 1, 1, 1, 1],
        "moe_router_topk": 2,
        "moe_router_topk_scaling_factor": 3.0,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
        "moe_shared_expert_intermediate_size": 40,
        "mtp_num_layers": 2,
        "swiglu": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "seq_length": 32,
    }
    assert {name: getattr(args, name) for name in expected} == expected
    assert (args.step35_gate_layout, args.step35_window) == ("headwise", "hf")


def test_without_a_config_nothing_is_changed(parse):
    args = parse("--num-layers", "3", "--hidden-size", "8")
    assert (args.num_layers, args.hidden_size, args.num_experts) == (3, 8, None)
    assert not hasattr(args, "step35_fingerprint")


def test_arguments_win_over_variables(parse, monkeypatch, tmp_path):
    monkeypatch.setenv("STEP35_WINDOW", "hf")
    monkeypatch.setenv("STEP35_GATE_LAYOUT", "headwise")
    monkeypatch.setenv("STEP35_PADDED_LOGITS", "masked")
    (tmp_path / "other.json").write_text(json.dumps(tiny_config(intermediate_size=80)))
    monkeypatch.setenv("STEP35_CONFIG", str(tmp_path / "other.json"))
    args = parse(
        *("--step35-window", "steptron", "--step35-gate-layout", "expanded"),
        *("--step35-padded-logits", "kept"),
        config=tiny_config(),
    )
    assert args.ffn_hidden_size == 48
    choices = (args.step35_window, args.step35_gate_layout, args.step35_padded_logits)
    assert choices == ("steptron", "expanded", "kept")
    status = step35_patch.status()
    assert (status.window, status.gate_layout, status.padded_logits) == choices


def test_what_says_the_same_is_no_conflict(parse):
    args = parse(
        *"--num-layers 6 --moe-layer-freq ([0]*2+[1]*4) --rotary-base 50".split(),
        *"--rotary-percent 0.5 --hidden-dropout 0.1 --vocab-size 90".split(),
        config=tiny_config(),
    )
    assert (args.hidden_dropout, args.vocab_size, args.padded_vocab_size) == (0.1, 90, 96)


def test_fewer_mtp_layers_may_be_trained(parse):
    assert parse("--mtp-num-layers", "1", config=tiny_config()).mtp_num_layers == 1
    # Megatron builds a block of MTP layers unless it is None.
    assert parse("--mtp-num-layers", "0", config=tiny_config()).mtp_num_layers is None
    without = Step35Config.from_dict(tiny_config()).without_mtp().to_dict()
    assert parse("--mtp-num-layers", "0", config=without).mtp_num_layers is None
    with pytest.raises(Step35ArgumentError, match="--use-checkpoint-args: expected none with"):
        parse("--mtp-num-layers", "0", "--use-checkpoint-args", config=tiny_config())
    with pytest.raises(Step35ArgumentError, match=r"--mtp-num-layers: expected 2, .* found 3"):
        parse("--mtp-num-layers", "3", config=tiny_config())


def test_all_problems_come_in_one_error(parse):
    with pytest.raises(Step35ArgumentError) as error:
        parse(
            *"--num-layers 5 --num-query-groups 4 --rotary-base 3 --window-size 3,0".split(),
            *"--tensor-model-parallel-size 4 --expert-model-parallel-size 3".split(),
            config=tiny_config(),
        )
    text = str(error.value)
    assert len(error.value.problems) == 6
    for line in (
        "--num-layers: expected 6, which the config needs, found 5; leave it out",
        "--num-query-groups: expected 2, which the config needs, found 4",
        "--rotary-base: expected 50, which the config has for the full-attention layers, found 3",
        "--window-size: expected None, found (3, 0)",
        "--tensor-model-parallel-size: expected a divisor of num_attention_groups=2, found 4",
        "--expert-model-parallel-size: expected a divisor of moe_num_experts=4, found 3",
    ):
        assert line in text


@pytest.mark.parametrize("use_moe", [True, False])
def test_a_model_without_experts_has_no_expert_parallelism(parse, use_moe):
    """Of `use_moe` true it may have no number of experts, and of false a number."""
    config = tiny_config(use_moe=use_moe, moe_layers_enum="", moe_num_experts=[4, ...][use_moe])
    assert parse(config=config).num_experts is None
    with pytest.raises(Step35ArgumentError, match="-size: expected 1 for a model without experts"):
        parse("--expert-model-parallel-size", "2", config=config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--context-parallel-size 2 --transformer-impl local", "no-create-attention-mask"),
        ("--tensor-model-parallel-size 0", "--tensor-model-parallel-size: expected 1 or more"),
        ("--context-parallel-size 2", "--cp-comm-type: expected a2a or all_gather"),
        ("--context-parallel-size 4 --cp-comm-type a2a", "size = 1 x 4, .* use all_gather there"),
        (
            "--context-parallel-size 2 --cp-comm-type p2p p2p a2a all_gather p2p a2a",
            r"--cp-comm-type: .* with a sliding window, .* found p2p in 1; give",
        ),
        (
            "--context-parallel-size 2 --cp-comm-type a2a a2a",
            "--cp-comm-type: expected one value, or one for each of num_hidden_layers=6, found 2",
        ),
        ("--cuda-graph-impl local", "--cuda-graph-impl: expected none, found local"),
        ("--flash-decode", "--flash-decode: expected False, found True"),
        ("--perform-rl-step", "--perform-rl-step: expected False, found True; .*dynamic context"),
        ("--inference-dynamic-batching", "dynamic-batching: expected False, found True.*static"),
        ("--use-rope-scaling", "--use-rope-scaling: expected False"),
        ("--window-attn-skip-freq 4", "--window-attn-skip-freq: expected None, found 4"),
        ("--attention-output-gate", "--attention-output-gate: expected False"),
        ("--spec local", "--spec: expected None"),
        ("--moe-router-num-groups 4", "--moe-router-num-groups: expected None, found 4"),
        ("--moe-router-group-topk 1", "--moe-router-group-topk: expected None, found 1"),
        ("--moe-router-load-balancing-type sinkhorn", "type: expected none, found .*sinkhorn"),
        ("--moe-router-pre-softmax", "--moe-router-pre-softmax: expected False"),
        ("--squared-relu", "--squared-relu: expected False, found True; .* SwiGLU"),
        ("--moe-use-upcycling", "--moe-use-upcycling: expected False"),
        ("--moe-aux-loss-coeff 0.01", "--moe-aux-loss-coeff: expected 0 with .* none"),
        ("--transformer-impl local --fp8-format hybrid", "--fp8-format: expected None with"),
        ("--reset-attention-mask", "--reset-attention-mask: expected none with --transformer-impl"),
        (
            "--reset-attention-mask --transformer-impl local "
            "--no-create-attention-mask-in-dataloader",
            "--reset-attention-mask: expected none without a mask",
        ),
        (
            "--reset-attention-mask --context-parallel-size 2 --transformer-impl local",
            "--reset-attention-mask: expected none with --context-parallel-size 2",
        ),
        ("--reset-position-ids", "--reset-position-ids: .* without --reset-attention-mask"),
        ("--sft --reset-position-ids", "--reset-position-ids: expected none with --sft"),
        (
            "--sft --micro-batch-size 2",
            "--micro-batch-size: expected 1 with --sft, found 2",
        ),
        (
            "--sft --context-parallel-size 2 --transformer-impl local",
            "--calculate-per-token-loss: expected it with --sft and --context-parallel-size 2",
        ),
        (
            "--padded-vocab-size 97 --tensor-model-parallel-size 2",
            "--padded-vocab-size: .* of .* while --step35-padded-logits is masked",
        ),
    ],
)
def test_what_cannot_work_is_refused(parse, words, message):
    with pytest.raises(Step35ArgumentError, match=message):
        parse(*words.split(), config=tiny_config())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--freeze-all-layers", "--freeze-all-layers: expected False, .* would be trained"),
        (
            "--hybrid-context-parallel",
            "--hybrid-context-parallel: expected none with --transformer-impl local",
        ),
        ("--mtp-detach-heads", "--mtp-detach-heads: expected False, .* Step-3.5 has one for each"),
    ],
)
def test_newer_options_that_cannot_work_are_refused(parse, option, message):
    words = ["--context-parallel-size", "2", "--transformer-impl", "local", option]
    try:
        with pytest.raises(Step35ArgumentError, match=message):
            parse(*words, config=tiny_config())
    except SystemExit:  # argparse's, of a Megatron-Core without it
        pytest.skip(f"{option} is not in this Megatron-Core")


def test_experts_are_not_gathered_before_their_step(parse, monkeypatch):
    """With one data-parallel rank of experts there is nothing to gather."""
    words = "--overlap-param-gather-with-optimizer-step --expert-model-parallel-size 2".split()
    monkeypatch.setenv("WORLD_SIZE", "2")
    parse(*words, config=tiny_config())
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(Step35ArgumentError, match="experts before their step"):
        parse(*words, config=tiny_config())


def test_supervised_finetuning_gets_no_mask_from_the_data_loader(parse):
    args = parse("--sft", config=tiny_config())
    assert not args.create_attention_mask_in_dataloader
    assert parse(config=tiny_config()).create_attention_mask_in_dataloader


def test_router_bias_is_fixed_unless_a_rate_is_given(parse):
    """A run from scratch is told that nothing balances its experts then."""
    with pytest.warns(RuntimeWarning, match="nothing balances the experts of a run from scratch"):
        args = parse(config=tiny_config())
    assert args.moe_router_bias_update_rate == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert parse("--load", "/x", config=tiny_config()).moe_router_bias_update_rate == 0
        args = parse("--moe-router-bias-update-rate", "1e-3", config=tiny_config())
        assert args.moe_router_bias_update_rate == 1e-3
        balanced = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-3"
        parse(*balanced.split(), config=tiny_config())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--use-cpu-initialization --expert-model-parallel-size 2",
            "starts the experts of all ranks alike",
        ),
        (
            "--load /x --step35-gate-layout expanded --log-params-norm",
            "counts all rows of the expanded gate",
        ),
    ],
)
def test_what_misleads_is_said(parse, words, message):
    with pytest.warns(RuntimeWarning, match=message):
        parse(*words.split(), config=tiny_config())


def test_full_layers_may_send_keys_round_in_a_ring(parse):
    """A list has a value for each decoder layer; the MTP layers have the last sliding one's."""
    words = "--context-parallel-size 2 --cp-comm-type p2p a2a all_gather a2a p2p all_gather"
    parse(*words.split(), config=tiny_config())
    # One that is cut for a ring of four, in sliding layers by all_gather alone.
    words = "--context-parallel-size 4 --cp-comm-type p2p" + " all_gather" * 3 + " p2p all_gather"
    parse(*words.split(), config=tiny_config())
    config = tiny_config(layer_types=[FULL] * 6 + [SLIDING] * 2)
    with pytest.raises(Step35ArgumentError, match=r"found p2p in 6-7; give"):
        parse("--context-parallel-size", "2", config=config)


def test_context_parallelism_is_free_where_there_is_no_window(parse):
    config = tiny_config(layer_types=[FULL] * 8, rope_theta=50.0, partial_rotary_factors=None)
    parse("--context-parallel-size", "2", config=config)


def test_yaml_is_refused(parse, tmp_path):
    path = tmp_path / "args.yaml"
    path.write_text("enable_msc: false\ndisable_msc_deprecated: false\n")
    with pytest.raises(Step35ArgumentError, match="--yaml-cfg: expected none"):
        parse("--yaml-cfg", str(path), config=tiny_config(), option=False)


def test_megatron_pads_the_vocabulary_where_it_is_asked_to(parse):
    args = parse("--make-vocab-size-divisible-by", "64", config=tiny_config())
    assert (args.vocab_size, args.padded_vocab_size) == (96, None)


def test_own_arguments_need_a_config(parse):
    with pytest.raises(Step35ArgumentError, match="give --step35-config or STEP35_CONFIG"):
        parse("--step35-window", "steptron")
    with pytest.raises(
        Step35ArgumentError, match="--step35-accept-changed and --step35-decay-1d: expected"
    ):
        parse("--load", "anywhere", "--step35-accept-changed", "rope_theta")


def test_broken_config_is_told_before_anything_else(parse):
    with pytest.raises(step35_patch.Step35ConfigError, match="hidden_size"):
        parse("--num-layers", "5", config=tiny_config(hidden_size=-1))


def test_help_has_the_arguments():
    text = add_arguments(argparse.ArgumentParser()).format_help()
    for option in ("config PATH", "gate-layout", "window", "padded-logits {masked,kept}"):
        assert f"--step35-{option}" in text


def test_parsed_arguments_pass_the_config_hook(parse):
    """What was filled in gives a TransformerConfig without conflicts."""
    from megatron.training.arguments import core_transformer_config_from_args, validate_args

    args = parse(
        *"--seq-length 32 --micro-batch-size 1 --train-iters 1 --lr 1e-3".split(),
        *"--transformer-impl local --tokenizer-type NullTokenizer --mock-data".split(),
        *"--no-persist-layer-norm --no-gradient-accumulation-fusion".split(),
        *"--no-masked-softmax-fusion --no-rope-fusion".split(),
        config=tiny_config(),
    )
    validate_args(args)
    config = core_transformer_config_from_args(args)
    assert config.step35.config.fingerprint == args.step35_fingerprint
    assert config.hetereogenous_dist_checkpoint


@pytest.mark.parametrize("option", [True, False])
def test_accepted_changes_are_checked_by_name(parse, monkeypatch, option):
    def accepting(*names: str, more: tuple[str, ...] = ("--load", "anywhere")):
        if option:
            return parse("--step35-accept-changed", *names, *more, config=tiny_config())
        monkeypatch.setenv("STEP35_ACCEPT_CHANGED", ", ".join(names))
        return parse(*more, config=tiny_config())

    assert accepting("rope_theta", "sliding_window").step35_accept_changed == [
        "rope_theta",
        "sliding_window",
    ]
    with pytest.raises(Step35ArgumentError, match="found hidden_size; tensors have other shapes"):
        accepting("rope_theta", "hidden_size")
    with pytest.raises(Step35ArgumentError, match="--load: expected a checkpoint with"):
        accepting("rope_theta", more=())


def test_checkpoint_of_another_model_is_named(parse):
    args = parse(config=tiny_config())
    here = settings.active()
    check_checkpoint(args, "iter_0000002", here)
    other = argparse.Namespace(**vars(args))
    other.step35_window, other.step35_fingerprint = "steptron", "0" * 64
    with pytest.raises(Step35MismatchError) as error:
        check_checkpoint(other, "iter_0000002", here)
    assert "window: steptron in the checkpoint, hf in this run" in str(error.value)
    assert "set STEP35_WINDOW=steptron" in str(error.value)
    assert "config fingerprint" not in str(error.value)  # its config is there, and this one
    # Saved before checkpoints had their config.
    del other.step35_config_document
    with pytest.raises(Step35MismatchError) as error:
        check_checkpoint(other, "iter_0000002", here)
    assert f"config fingerprint: {'0' * 64} in the checkpoint" in str(error.value)
    assert "carries no config that would tell which fields differ" in str(error.value)
    with pytest.warns(RuntimeWarning, match="does not say which Step-3.5 model"):
        check_checkpoint(argparse.Namespace(num_layers=6), "iter_0000002", here)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # 14,432 rows of a sliding layer, 10,304 of a full one.
        (
            f"{FP8} 8",
            "--fp8-format: expected linear layers with rows and columns on each rank that 16 "
            "divides, as Transformer Engine needs for the recipe delayed, found "
            "self_attention.linear_qkv with 1288 rows on each of 8 tensor-parallel ranks (layers "
            f"{FULL_LAYERS}), self_attention.linear_qkv with 1804 rows on each of 8 "
            f"tensor-parallel ranks (layers {SLIDING_LAYERS}); "
            "use --step35-gate-layout expanded, or --tensor-model-parallel-size 1 or 2, or leave "
            "it out",
        ),
        (
            f"{FP8} 4",
            f"with 3608 rows on each of 4 tensor-parallel ranks (layers {SLIDING_LAYERS}); ",
        ),
        (f"{FP8} 2 --fp8-recipe mxfp8", "with 7216 rows on each of 2 tensor-parallel ranks (lay"),
        (
            f"{FP8} 8 --fp8-recipe tensorwise --first-last-layers-bf16",
            "1288 rows on each of 8 tensor-parallel ranks (layers 4,8,12,16,20,24,28,32,36,40)",
        ),
        (f"{FP8} 2", None),
        (f"{FP8} 8 --step35-gate-layout expanded", None),
        (f"{FP8} 8 --step35-gate-layout expanded --fp8-recipe mxfp8", None),
        ("--transformer-impl transformer_engine --tensor-model-parallel-size 8", None),
    ],
)
def test_sizes_that_fp8_does_not_take_are_refused(parse, words, message):
    config = json.loads(PUBLISHED.read_text())
    if message is None:
        parse(*words.split(), config=config)
        return
    with pytest.raises(Step35ArgumentError) as error:
        parse(*words.split(), config=config)
    assert message in str(error.value)
    assert len(error.value.problems) == 1


def test_distributed_optimizer_of_the_other_implementation_is_refused(parse):
    """It would be read without an error, each parameter's from another one's place."""
    args = parse("--transformer-impl", "local", config=tiny_config())
    saved = argparse.Namespace(**vars(args))
    state = {"args": saved, "content_metadata": {"distrib_optim_sharding_type": "dp_reshardable"}}
    check_implementation(state, args, "iter_0000002")
    saved.transformer_impl, saved.moe_grouped_gemm = "transformer_engine", True
    with pytest.raises(Step35MismatchError) as error:
        check_implementation(state, args, "iter_0000002")
    assert "--transformer-impl: transformer_engine in the checkpoint, local in" in str(error.value)
    assert "--moe-grouped-gemm: True in the checkpoint, False in this run" in str(error.value)
    for option in ("finetune", "no_load_optim"):
        without = argparse.Namespace(**vars(args) | {option: True})
        check_implementation(state, without, "iter_0000002")
    for kind in ("fully_reshardable", None):
        state["content_metadata"]["distrib_optim_sharding_type"] = kind
        check_implementation(state, args, "iter_0000002")


def test_scales_that_are_left_unread_are_named(parse):
    args = parse("--transformer-impl", "local", config=tiny_config())
    saved = argparse.Namespace(**vars(args) | {"fp8": "hybrid"})
    with pytest.warns(RuntimeWarning, match="iter_0000002 was saved by a run in FP8, whose scales"):
        check_implementation({"args": saved}, args, "iter_0000002")
