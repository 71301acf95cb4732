"""FP8 and FP4 with sizes that Transformer Engine does not multiply: refused before a run."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from support.ours import build
from support.reference import random_weights, tiny_config, write_hf_folder

from step35_patch import Step35Config, Step35ModelProvider
from step35_patch.model.low_precision import low_precision_problems


def settings(**changes):
    """What is read of a TransformerConfig."""
    return SimpleNamespace(
        **{
            "transformer_impl": "transformer_engine",
            "fp8": "hybrid",
            "fp8_recipe": "tensorwise",
            "tensor_model_parallel_size": 1,
            "expert_tensor_parallel_size": None,
            "mtp_num_layers": 2,
            "first_last_layers_bf16": False,
            **changes,
        }
    )


@pytest.mark.megatron
@pytest.mark.parametrize("gate_layout", ["headwise", "expanded"])
@pytest.mark.parametrize("recipe", ["delayed", "mxfp8"])
def test_every_linear_layer_of_a_built_model_is_looked_at(tmp_path, gate_layout, recipe):
    """The sizes are those of the live weights; 16 divides some of them and 32 others."""
    document = tiny_config(
        intermediate_size=40, moe_intermediate_size=24, share_expert_dim=64, hidden_size=40
    )
    hf = write_hf_folder(tmp_path, document, random_weights(document, 3))
    model = build(hf, gate_layout=gate_layout, transformer_impl="local", moe_grouped_gemm=False)
    wanted = set()
    for name, weight in model.named_parameters():
        layer = re.search(r"(mtp\.)?layers\.(\d+)\.", name)
        if layer is None or weight.dim() == 1 or "router" in name or "mtp_output" in name:
            continue
        index = int(layer[2]) + (6 if layer[1] else 0)
        module = re.sub(
            r".*layers\.\d+\.(transformer_layer\.|mtp_model_layer\.)?|\.weight", "", name
        )
        module = re.sub(r"local_experts\.\d+", "experts", module)
        for what, size in zip(("rows", "columns"), weight.shape, strict=True):
            if size % {"delayed": 16, "mxfp8": 32}[recipe]:
                wanted.add((module, size, what, index))
    [problem] = low_precision_problems(
        settings(fp8_recipe=recipe), Step35Config.from_pretrained(hf), gate_layout
    )
    found = {
        (module, int(size), what, index)
        for module, size, what, layers in re.findall(
            r"(\S+) with (\d+) (rows|columns) \(layers ([\d,-]+)\)", problem.found
        )
        for index in _indices(layers)
    }
    assert found == wanted
    assert len({module for module, *_ in found}) == 9


def _indices(text: str):
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def test_experts_have_a_tensor_parallel_size_of_their_own():
    config = Step35Config.from_dict(tiny_config(moe_intermediate_size=32, share_expert_dim=64))
    parallel = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 4}
    [problem] = low_precision_problems(settings(**parallel), config, "expanded")
    found = re.findall(
        r"experts.experts.linear_fc2 with (\S+) columns on each of (.*?) \(", problem.found
    )
    assert found == [("8", "4 expert-tensor-parallel ranks")]


@pytest.mark.transformer_engine(only=True)
@pytest.mark.megatron
def test_provider_refuses(tmp_path):
    document = tiny_config()
    hf = write_hf_folder(tmp_path, document, random_weights(document, 3))
    with pytest.raises(ValueError, match=r"fp8: expected linear layers .* 16 divides") as error:
        Step35ModelProvider.from_hf(hf, fp8="hybrid", transformer_impl="transformer_engine")
    assert "mlp.shared_experts.linear_fc2 with 40 columns (layers 2-5)" in str(error.value)
