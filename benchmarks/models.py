"""Models for the benchmarks: ours at any size, and stock Megatron-Core's of the same shape.

All on the CPU, with Megatron-Core's local implementation. Ours has the published config's fields
where a benchmark does not change them, with heads, groups and widths an eighth of the published.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import paired
import torch

FULL, SLIDING = "full_attention", "sliding_attention"
PER_LAYER = ("layer_types", "rope_theta", "partial_rotary_factors")
CLAMPS = ("swiglu_limits", "swiglu_limits_shared")


def published() -> dict[str, Any]:
    from step35_patch.config import packaged_config_path

    return json.loads(Path(packaged_config_path()).read_text("utf-8"))


def with_layers(config: dict[str, Any], layers: int, dense: int) -> dict[str, Any]:
    """The first layers of a config, the last one with its last one's clamps; no MTP layers."""
    last = config["num_hidden_layers"] - 1
    cut = {name: config[name][:layers] for name in PER_LAYER}
    cut |= {name: [0.0] * (layers - 1) + [config[name][last]] for name in CLAMPS}
    return (
        config
        | cut
        | {
            "num_hidden_layers": layers,
            "num_nextn_predict_layers": 0,
            "moe_layers_enum": ",".join(map(str, range(dense, layers))),
        }
    )


def small(*, layers: int = 8, experts: int = 32, **changes: Any) -> dict[str, Any]:
    """A config.json of hidden size 512: 8 and 12 heads of 128 channels on one group, window 512."""
    config = with_layers(published(), layers, dense=1)
    sliding = config["attention_other_setting"] | {
        "num_attention_heads": 12,
        "num_attention_groups": 1,
    }
    return (
        config
        | {
            "torch_dtype": "float32",
            "hidden_size": 512,
            "intermediate_size": 1408,
            "vocab_size": 4096,
            "num_attention_heads": 8,
            "num_attention_groups": 1,
            "attention_other_setting": sliding,
            "moe_num_experts": experts,
            "moe_intermediate_size": 160,
            "share_expert_dim": 160,
        }
        | changes
    )


def prepare() -> None:
    """The stand-in for CUDA, and Megatron-Core's groups of one process. Once in a process."""
    from step35_patch import cpu

    cpu.install()
    from support.ours import initialize_megatron

    initialize_megatron()
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(0)  # stock attention asks for the generator of its dropout


def provider(config: dict[str, Any], **overrides: Any) -> Any:
    from step35_patch import Step35ModelProvider

    options = {"transformer_impl": "local", "moe_grouped_gemm": False}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.json")
        file.write_text(json.dumps(config))
        return Step35ModelProvider.from_hf(file, **options | overrides)


def stock_gpt(config: dict[str, Any], **overrides: Any) -> Any:
    """Stock Megatron-Core's GPTModel of the same shape, as far as it goes.

    All layers have the full ones' heads and neither window nor clamp.
    """
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from step35_patch import Step35Config
    from step35_patch.model.megatron_fields import model_fields

    fields = model_fields(Step35Config.from_dict(config))
    # Megatron-Core's own local norm has no zero-centered weight.
    fields |= {"layernorm_zero_centered_gamma": False, "transformer_impl": "local"}
    core = TransformerConfig(**fields | overrides)
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(
        core, use_transformer_engine=False, normalization="RMSNorm"
    )
    return GPTModel(
        config=core,
        transformer_layer_spec=spec,
        vocab_size=config["vocab_size"],
        max_sequence_length=config["max_position_embeddings"],
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def step(model: torch.nn.Module, tokens: int, seed: int = 0) -> paired.Result:
    """Forward and backward of one sequence, in training, without an optimizer."""
    vocabulary = model.vocab_size
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (1, tokens + 1), generator=generator)
    positions = torch.arange(tokens)[None]
    model.zero_grad(set_to_none=True)
    with paired.PeakMemory() as peak:
        start = paired.clock()
        loss = model(ids[:, :-1], positions, None, labels=ids[:, 1:]).mean()
        forward = paired.clock() - start
        loss.backward()
        total = paired.clock() - start
    return {
        "forward_s": forward,
        "total_s": total,
        "peak_mib": peak.mib(),
        "check": [loss.item()],
    }
