"""Routed experts without permutation: as Megatron-Core's steps, with less kept for backward."""

from __future__ import annotations

import pytest
import torch
from support.ours import build, published_gradients, run
from support.reference import random_tokens, random_weights, tiny_config, write_hf_folder

pytestmark = pytest.mark.megatron

from megatron.core.transformer.moe.token_dispatcher import (  # noqa: E402
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
)

from step35_patch.model.experts import WholeTokenDispatcher  # noqa: E402


def moe_layers(model: torch.nn.Module) -> list:
    return [layer.mlp for layer in model.decoder.layers if layer.plan.is_moe]


def watch(model: torch.nn.Module) -> list[int]:
    """Hooks on the experts' layers, as Megatron's overlapped gathering of parameters has them.

    Returns the tokens that each call of a watched layer got, as the calls are made.
    """
    calls: list[int] = []
    for mlp in moe_layers(model):
        for expert in mlp.experts.local_experts:
            expert.linear_fc1.register_forward_pre_hook(lambda _, x: calls.append(x[0].size(0)))
    return calls


def results(model: torch.nn.Module, seed: int, length: int = 25) -> dict[str, torch.Tensor]:
    """Logits and gradients of a step."""
    input_ids, labels = random_tokens(seed, 2, length)
    model.train()
    losses = run(model, input_ids, labels)
    losses.mean().backward()
    found = {name: value.clone() for name, value in published_gradients(model).items()}
    model.zero_grad(set_to_none=True)
    return found | {"losses": losses.detach()}


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    # More experts than a few tokens reach: some get none.
    config = tiny_config(moe_num_experts=24, moe_top_k=3)
    folder = tmp_path_factory.mktemp("hf")
    return write_hf_folder(folder, config, random_weights(config, 71))


@pytest.mark.parametrize("options", [{}, {"moe_token_dispatcher_type": "alltoall"}], ids=str)
@pytest.mark.parametrize("seed", [1, 2])
def test_whole_tokens_equal_megatrons_steps(hf_folder, options, seed):
    """The same model, first with tokens where they are, then with hooks that wait for calls."""
    model = build(hf_folder, **options)
    found = results(model, seed)
    calls = watch(model)
    expected = results(model, seed)
    assert len(calls) == 4 * 24 and sum(calls) == 4 * 2 * 25 * 3 and 0 in calls
    for name, value in expected.items():
        off = (found[name] - value).abs().max() / value.abs().max()
        assert off < 1e-5, f"{name}: {off}"


def test_recomputed_layers_equal_kept_ones(hf_folder):
    expected = results(build(hf_folder), 3)
    recomputed = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    found = results(build(hf_folder, **recomputed), 3)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_bf16_is_as_close_as_megatrons_steps(tmp_path):
    """One layer: in a model, near ties of the next layers' routers would flip."""
    # 0.25 is a value that bf16 often meets.
    config = tiny_config(torch_dtype="bfloat16", swiglu_limits=[0.25] * 8)
    weights = {
        name: tensor if name.endswith("router_bias") else tensor.to(torch.bfloat16)
        for name, tensor in random_weights(config, 72).items()
    }
    model = build(
        write_hf_folder(tmp_path / "hf", config, weights), bf16=True, params_dtype=torch.bfloat16
    )
    mlp = moe_layers(model)[0]
    generator = torch.Generator().manual_seed(4)
    hidden, grad = torch.randn(2, 64, 1, 32, generator=generator).to(torch.bfloat16)

    def layer() -> list[torch.Tensor]:
        x = hidden.clone().requires_grad_()
        output, _ = mlp(x)
        mlp.zero_grad(set_to_none=True)
        output.backward(grad)
        return [output.detach(), x.grad, *(p.grad for p in mlp.parameters())]

    found = layer()
    watch(model)
    for a, b in zip(found, layer(), strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= 2e-2 * b.abs().max()


def test_less_is_kept_than_by_megatrons_steps(hf_folder):
    model = build(hf_folder)
    mlp = moe_layers(model)[0]

    def kept() -> int:
        """Elements beyond the parameters."""
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_floating_point():
                seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        hidden = torch.randn(512, 1, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            mlp(hidden)
        return sum(t.untyped_storage().nbytes() // 4 for p, t in seen.items() if p not in own)

    ours = kept()
    watch(model)
    # For each of the 3 copies of a token, beside fc1's output (48): its input (32), and SwiGLU's
    # parts (silu(gate), the product and the weighted product, 24 each).
    assert kept() - ours >= 512 * 3 * (32 + 3 * 24)


@pytest.mark.parametrize(
    ("options", "dispatcher"),
    [
        ({}, WholeTokenDispatcher),
        ({"moe_expert_capacity_factor": 1.0}, MoEAllGatherTokenDispatcher),
        (
            {"moe_token_dispatcher_type": "alltoall", "moe_shared_expert_overlap": True},
            MoEAlltoAllTokenDispatcher,
        ),
    ],
    ids=["whole", "dropping", "overlapped"],
)
def test_options_that_need_megatrons_steps_get_them(hf_folder, options, dispatcher):
    model = build(hf_folder, **options)
    assert {type(mlp.token_dispatcher) for mlp in moe_layers(model)} == {dispatcher}
