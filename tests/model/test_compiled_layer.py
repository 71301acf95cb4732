"""torch.compile around a layer computes what the layer does."""

from __future__ import annotations

import pytest
import torch
from support.ours import build
from support.parity import relative
from support.reference import random_weights, tiny_config, write_hf_folder


@pytest.mark.slow
@pytest.mark.parametrize("index", [3, 4], ids=["sliding", "full"])
def test_compiled_layer(tmp_path, monkeypatch, index):
    """Forward and backward by Dynamo and AOTAutograd, without inductor's code generation.

    Dynamo goes round what it does not take (RoPE's writes into a strided view) and compiles
    the rest. The stand-in for CUDA keeps it off; Megatron-Core was imported without it.
    """
    config = tiny_config()
    model = build(write_hf_folder(tmp_path, config, random_weights(config, 21)))
    layer = model.decoder.layers[index]
    states = torch.randn(24, 1, config["hidden_size"], requires_grad=True)
    inputs = [states, *(p for p in layer.parameters() if p.requires_grad)]

    def outputs(layer) -> list[torch.Tensor]:
        found = layer(states, attention_mask=None)[0]
        gradients = torch.autograd.grad(found.square().sum(), inputs, allow_unused=True)
        return [found, *(gradient for gradient in gradients if gradient is not None)]

    wanted = outputs(layer)
    from torch import _dynamo
    from torch._dynamo.testing import CompileCounterWithBackend

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    graphs = CompileCounterWithBackend("aot_eager")
    with _dynamo.config.patch(disable=False):
        found = outputs(torch.compile(layer, backend=graphs))
    _dynamo.reset()
    assert graphs.frame_count > 1
    assert len(found) == len(wanted)
    assert max(relative(one, other) for one, other in zip(found, wanted, strict=True)) < 1e-4
