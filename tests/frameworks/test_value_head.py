"""A value head in place of the output layer, as trainers put it there for a critic."""

from __future__ import annotations

import pytest
import torch
from support.ours import build, initialize_megatron, run
from support.reference import random_tokens, random_weights, tiny_config, write_hf_folder

from step35_patch import Step35ModelProvider
from step35_patch.checkpoint import load_hf_weights, published_tensors_of, save_hf_weights
from step35_patch.frameworks import megatron_to_hf

pytestmark = [pytest.mark.megatron, pytest.mark.transformer_engine]

LENGTH = 24


class ValueHead(torch.nn.Linear):
    """One number a token, called as Megatron-Core calls an output layer."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 1, bias=False)

    def forward(self, hidden_states, weight=None, runtime_gather_output=None):
        return super().forward(hidden_states).float(), None


@pytest.fixture
def folder(tmp_path):
    initialize_megatron()
    # A vocabulary that is padded, so that its output matrices have hooks.
    config = tiny_config(vocab_size=90, pad_token_id=89)
    return write_hf_folder(tmp_path / "hf", config, random_weights(config, 71))


def with_value_head(folder, **options) -> torch.nn.Module:
    model = build(folder, **options)
    model.output_layer = ValueHead(model.config.hidden_size)
    return model


def test_without_mtp_layers_the_model_returns_its_head_s_values(folder):
    """And the head is trained: its gradient is that of the same sum over the hidden states."""
    model = with_value_head(folder, mtp_num_layers=0)
    tokens = random_tokens(71, 2, LENGTH)[0] % 89
    seen = []
    hook = model.output_layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    values = run(model, tokens)
    hook.remove()
    assert values.shape == (2, LENGTH, 1)
    hidden = seen[0].transpose(0, 1)  # [b, s, h]
    torch.testing.assert_close(values, hidden @ model.output_layer.weight.T)
    values.sum().backward()
    assert model.embedding.word_embeddings.weight.grad.abs().max() > 0
    expected = hidden.detach().sum((0, 1)).unsqueeze(0)
    torch.testing.assert_close(model.output_layer.weight.grad, expected)


@pytest.mark.parametrize("with_labels", [False, True])
def test_with_mtp_layers_the_first_forward_says_to_leave_them_out(folder, with_labels):
    model = with_value_head(folder)
    tokens = random_tokens(71, 2, LENGTH)[0] % 89
    message = r"output_layer: .* found a ValueHead in its place: .* mtp_num_layers=0"
    with pytest.raises(RuntimeError, match=message):
        run(model, tokens, tokens if with_labels else None)


def test_model_with_a_value_head_has_no_published_layout(folder, tmp_path):
    """Neither way, nor one by one: a head of one row is no output matrix."""
    model = with_value_head(folder, mtp_num_layers=0)
    before = {name: value.clone() for name, value in model.named_parameters()}
    message = r"output_layer.weight: expected .*90 rows.* found"
    with pytest.raises(ValueError, match=message):
        load_hf_weights(model, folder)
    with pytest.raises(ValueError, match=message):
        list(published_tensors_of(model))
    with pytest.raises(ValueError, match=message):
        save_hf_weights(model, tmp_path / "out", without_mtp=True)
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
    head = model.output_layer.weight
    with pytest.raises(ValueError, match=r"output_layer.weight: expected .*\[90, 32\]"):
        megatron_to_hf("output_layer.weight", head, model.config)


def test_stock_head_of_a_model_built_before_activation_is_still_named(folder):
    """A ColumnParallelLinear is nobody's value head."""
    model = build(folder)
    stock = Step35ModelProvider.from_hf(folder, transformer_impl="local", mtp_num_layers=0)
    model.output_layer = stock.provide().output_layer
    with pytest.raises(RuntimeError, match="built before step35_patch was active"):
        run(model, random_tokens(71, 1, LENGTH)[0] % 89)
