"""RoPE: llama3 scaling as in transformers, packed and context-parallel as in Megatron-Core."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.ours import build, initialize_megatron
from support.reference import random_tokens, random_weights, tiny_config, write_hf_folder
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7RotaryEmbedding

from step35_patch import Step35Config
from step35_patch.config import packaged_config_path
from step35_patch.model.rope import Rotation, inverse_frequencies, rotary_pos_emb, rotate

pytestmark = pytest.mark.megatron

from megatron.core.models.common.embeddings.rope_utils import (  # noqa: E402
    _apply_rotary_pos_emb_bshd,
)
from megatron.core.models.common.embeddings.rotary_pos_embedding import (  # noqa: E402
    RotaryEmbedding,
)
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402


def group(rank: int, size: int) -> SimpleNamespace:
    """All that the angles read of a process group."""
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


def parallel(**changes) -> SimpleNamespace:
    defaults = {
        "sequence_parallel": False,
        "tensor_model_parallel_size": 1,
        "apply_rope_fusion": False,
    }
    return SimpleNamespace(**(defaults | changes))


@pytest.fixture(scope="module")
def published() -> Step35Config:
    return Step35Config.from_pretrained(packaged_config_path())


def test_published_frequencies_equal_the_reference(published):
    document = published.to_dict()
    reference = Step3p7RotaryEmbedding(
        Step3p7TextConfig(
            **{
                name: document[name]
                for name in (
                    "layer_types",
                    "rope_theta",
                    "partial_rotary_factors",
                    "rope_scaling",
                    "num_hidden_layers",
                    "num_nextn_predict_layers",
                    "head_dim",
                    "max_position_embeddings",
                )
            }
        )
    )
    for plan in published.layers:
        expected = getattr(reference, f"{plan.attention_type}_inv_freq")
        found = inverse_frequencies(
            plan.kv_channels, plan.rotary_percent, plan.rotary_base, plan.rope_scaling
        )
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    plain = inverse_frequencies(128, 0.5, 5e6, None)
    scaled = inverse_frequencies(128, 0.5, 5e6, published.layers[0].rope_scaling)
    kept, halved = torch.isclose(scaled, plain), torch.isclose(scaled, plain / 2)
    assert kept.any() and halved.any() and (~kept & ~halved).any()


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_context_parallel_ranks_have_their_positions(published, cp_size):
    initialize_megatron()
    plan = published.layers[1]
    stock = RotaryEmbedding(
        128, 1.0, rotary_base=10000, use_cpu_initialization=True, cp_group=group(0, 1)
    )
    whole = stock.get_emb(64)
    for rank in range(cp_size):
        hidden = torch.zeros(64 // cp_size, 1, 8)
        chunks = whole.chunk(2 * cp_size)
        expected = torch.cat([chunks[rank], chunks[2 * cp_size - 1 - rank]])
        expected = expected if cp_size > 1 else whole
        fused = parallel(apply_rope_fusion=True)
        found = rotary_pos_emb(plan, fused, hidden, None, group(rank, cp_size))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        found = rotary_pos_emb(plan, parallel(), hidden, None, group(rank, cp_size))
        # Halves are repeated in the angles.
        for table, function in ((found.cos, torch.cos), (found.sin, torch.sin)):
            torch.testing.assert_close(torch.cat([table, table], -1), function(expected))


def test_sequence_parallel_ranks_see_the_whole_sequence(published):
    config = parallel(sequence_parallel=True, tensor_model_parallel_size=4)
    found = rotary_pos_emb(published.layers[0], config, torch.zeros(8, 1, 8), None, group(0, 1))
    assert found.cos.shape == found.sin.shape == (32, 1, 1, 32)


def test_length_that_context_parallelism_cannot_split_is_an_error(published):
    with pytest.raises(ValueError, match="multiple of 2 \\* context_parallel_size = 4"):
        rotary_pos_emb(published.layers[0], parallel(), torch.zeros(3, 1, 8), None, group(0, 2))


def test_table_is_shared_by_the_layers_of_a_kind(published):
    def table(layer: int) -> int:
        hidden = torch.zeros(24, 1, 8)
        return id(rotary_pos_emb(published.layers[layer], parallel(), hidden, None, group(0, 1)))

    assert table(0) == table(4) == table(44)
    assert table(1) == table(2) == table(47)
    assert table(0) != table(1)


@pytest.mark.parametrize("turned", [24, 12])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_rotation_equals_megatrons(dtype, tolerance, turned):
    """All channels and half of them; x as it is cut out of linear_qkv's output."""
    generator = torch.Generator().manual_seed(turned)
    mixed = torch.randn(2, 17, 3, 40, generator=generator).to(dtype)
    angles = 9.0 * torch.randn(17, 1, 1, turned // 2, generator=generator)
    rotation = Rotation(angles.cos(), angles.sin())
    results = []
    for turn in (
        lambda x: rotate(x, rotation),
        lambda x: _apply_rotary_pos_emb_bshd(x, torch.cat([angles, angles], -1)),
    ):
        x = mixed.transpose(0, 1)[..., 8:32].detach().requires_grad_()
        y = turn(x)
        y.backward(torch.cos(torch.arange(y.numel()).view(y.shape)).to(dtype))
        assert y.dtype == dtype
        results.append((y.detach(), x.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * 4)


def test_rotation_keeps_nothing_of_the_heads():
    rotation = Rotation(torch.rand(17, 1, 1, 4), torch.rand(17, 1, 1, 4))
    x = torch.randn(17, 1, 3, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = rotate(x, rotation)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in rotation}
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_packed_sequences_equal_separate_ones(tmp_path):
    """Positions and windows start anew with each packed sequence."""
    config = tiny_config()
    folder = write_hf_folder(tmp_path / "hf", config, random_weights(config, 51))
    model = build(folder)
    lengths = [13, 30, 5]
    input_ids, _ = random_tokens(51, 1, sum(lengths))
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    together = model(input_ids, positions, None, packed_seq_params=packed)
    for n, start in zip(lengths, starts.tolist()[:-1], strict=True):
        alone = model(input_ids[:, start : start + n], torch.arange(n)[None], None)
        torch.testing.assert_close(
            together[:, start : start + n], alone, rtol=0, atol=2e-5 * alone.abs().max().item()
        )
