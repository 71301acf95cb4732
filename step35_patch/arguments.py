"""Megatron's command line: the arguments that describe a Step-3.5 model, and those of a CPU run.

Both are plain lists of strings, ready for ``pretrain_gpt.py`` or any script on
``megatron.training``, and accepted by the parsers of Megatron-Core 0.17 to 0.19.
"""

from step35_patch.config.model import Step35Config

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
    options: dict[str, object] = {
        "--num-layers": config.num_hidden_layers,
        "--hidden-size": config.hidden_size,
        "--ffn-hidden-size": config.intermediate_size,
        "--num-attention-heads": config.num_attention_heads,
        "--group-query-attention": None,
        "--num-query-groups": config.num_attention_groups,
        "--kv-channels": config.head_dim,
        "--qk-layernorm": None,
        "--normalization": "RMSNorm",
        "--norm-epsilon": config.rms_norm_eps,
        "--apply-layernorm-1p": None,  # zero-centred: the weight's offset from 1
        "--position-embedding-type": "rope",
        "--max-position-embeddings": config.max_position_embeddings,
        "--swiglu": None,
        "--disable-bias-linear": None,
        "--hidden-dropout": 0.0,  # Megatron's default is 0.1, for attention too
        "--attention-dropout": 0.0,
        "--untie-embeddings-and-output-weights": None,
        "--vocab-size": config.vocab_size,
        "--padded-vocab-size": config.vocab_size,
    }
    moe_layers = [int(plan.is_moe) for plan in config.layers[: config.num_hidden_layers]]
    if any(moe_layers):
        options |= {
            "--num-experts": config.moe_num_experts,
            "--moe-layer-freq": f"[{','.join(map(str, moe_layers))}]",
            "--moe-ffn-hidden-size": config.moe_intermediate_size,
            "--moe-shared-expert-intermediate-size": config.share_expert_dim,
            "--moe-router-topk": config.moe_top_k,
            "--moe-router-score-function": "sigmoid",
            "--moe-router-enable-expert-bias": None,
            "--moe-router-topk-scaling-factor": config.moe_router_scaling_factor,
            "--moe-router-dtype": "fp32",
            # The bias balances the experts; Megatron's default is an auxiliary loss.
            "--moe-router-load-balancing-type": "none",
        }
    if config.num_nextn_predict_layers:
        options["--mtp-num-layers"] = config.num_nextn_predict_layers
    return {name: None if value is None else str(value) for name, value in options.items()}
