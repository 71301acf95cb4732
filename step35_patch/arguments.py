"""Megatron's command line: the arguments that describe a Step-3.5 model, and those of a CPU run.

They are for ``pretrain_gpt.py`` or any script on ``megatron.training``, and accepted by the parsers
of Megatron-Core 0.17 to 0.19.
"""

from __future__ import annotations

from typing import NamedTuple

from step35_patch.config.model import Step35Config
from step35_patch.model.megatron_fields import decided_by

# What Megatron needs to run without a GPU, under `step35_patch.cpu`: Megatron-Core's own modules
# instead of Transformer Engine's, Gloo, weights drawn on the CPU, and no fused kernel.
CPU_ARGUMENTS = (
    "--transformer-impl",
    "local",
    "--distributed-backend",
    "gloo",
    "--use-cpu-initialization",
    "--no-masked-softmax-fusion",
    "--no-gradient-accumulation-fusion",
    "--no-persist-layer-norm",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
)


class OptionGroup(NamedTuple):
    """Options of one subject.

    Attributes:
        title: The subject.
        note: What a reader of a launch script should know of them; may be empty.
        options: Their names, in order.
    """

    title: str
    note: str
    options: tuple[str, ...]


# All that `megatron_options` may give.
OPTION_GROUPS = (
    OptionGroup(
        "Shape",
        "each published row of the embedding is kept, whatever the tokenizer's size",
        (
            *("--num-layers", "--hidden-size", "--ffn-hidden-size", "--swiglu"),
            *("--disable-bias-linear", "--untie-embeddings-and-output-weights"),
            *("--vocab-size", "--padded-vocab-size"),
        ),
    ),
    OptionGroup(
        "Attention",
        "of the full-attention layers; STEP35_CONFIG has the sliding ones' heads and window",
        (
            *("--num-attention-heads", "--group-query-attention", "--num-query-groups"),
            *("--kv-channels", "--qk-layernorm"),
        ),
    ),
    OptionGroup(
        "RoPE",
        "each layer's base, share and scaling are in STEP35_CONFIG",
        ("--position-embedding-type", "--max-position-embeddings"),
    ),
    OptionGroup(
        "Norm",
        "a weight is the offset from 1",
        ("--normalization", "--norm-epsilon", "--apply-layernorm-1p"),
    ),
    OptionGroup(
        "Dropout", "Megatron's default is 0.1", ("--hidden-dropout", "--attention-dropout")
    ),
    OptionGroup(
        "MoE",
        "the router's bias balances the experts, and stays as published at rate 0",
        (
            *("--num-experts", "--moe-layer-freq", "--moe-ffn-hidden-size"),
            *("--moe-shared-expert-intermediate-size", "--moe-router-topk"),
            *("--moe-router-score-function", "--moe-router-enable-expert-bias"),
            *("--moe-router-topk-scaling-factor", "--moe-router-dtype"),
            *("--moe-router-load-balancing-type", "--moe-router-bias-update-rate"),
        ),
    ),
    OptionGroup("MTP", "", ("--mtp-num-layers",)),
)


def megatron_arguments(config: Step35Config) -> list[str]:
    """The arguments of pretrain_gpt.py that describe the model of a config, as one list.

    Returns:
        Options and values, one string each; values are not quoted for a shell.
    """
    return [
        text
        for option, value in megatron_options(config).items()
        for text in ([option] if value is None else [option, value])
    ]


def megatron_options(config: Step35Config) -> dict[str, str | None]:
    """The options of pretrain_gpt.py that describe the model of a config, with their values.

    Where layers differ, they describe the full-attention ones, as far as Megatron has arguments:
    a sliding layer's heads and window, each layer's RoPE, the clamps and the head-wise gate come
    from the config itself, on each layer. Batch, sequence length, precision, parallel layout,
    token dispatcher, tokenizer and optimizer are the user's choice and not among them.

    ``--vocab-size`` is there for tokenizers that ask for it (NullTokenizer); the size of the
    embedding is ``--padded-vocab-size``, so that no tokenizer's size and no rounding up change it.
    It must be divisible by the tensor-parallel size.

    Returns:
        Each option's value, None for a flag.
    """
    options: dict[str, str | None] = {}
    for row in decided_by(config):
        if row.option is None:
            continue
        value = row.megatron_value(config)
        if isinstance(value, bool):
            options[row.option] = None
        elif value is not None:
            options[row.option] = _text(value)
    return options


def _text(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value)
