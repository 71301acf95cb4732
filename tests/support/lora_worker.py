"""What ranks do with Megatron-Bridge's LoRA for tests/bridge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# The first to import Megatron-Bridge, on a CPU.
from support.bridge_worker import provided  # isort: skip

from megatron.bridge import AutoBridge
from megatron.bridge.peft.canonical_lora import CanonicalLoRA
from megatron.bridge.peft.dora import DoRA
from megatron.bridge.peft.lora import LoRA
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from safetensors.torch import load_file

from step35_patch import Step35Config
from step35_patch.bridge import save_adapters
from step35_patch.checkpoint import (
    load_hf_weights,
    published_tensors_of,
    save_hf_weights,
)
from step35_patch.model.adapters import check_adapters
from step35_patch.tensors.published import published_tensors
from step35_patch.tensors.qkv import DriftedGateError, gate_rows
from step35_patch.tensors.spelling import transformers_place

Chunks = list[torch.nn.Module]

EVERY_LINEAR = [
    *("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "router", "eh_proj"),
    *("output_layer", "*mtp_output_heads.*"),
]
ALPHA, DIM = 8, 4


def lora(target_modules: list[str] = EVERY_LINEAR, **options: Any) -> LoRA:
    return LoRA(target_modules=list(target_modules), dim=DIM, alpha=ALPHA, **options)


def losses(chunks: Chunks, tokens: torch.Tensor) -> torch.Tensor:
    """The losses of each token, and those of the MTP layers."""
    MTPLossLoggingHelper.tracker.clear()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    (chunk,) = chunks
    found = chunk.train()(tokens, positions, None, labels=tokens.roll(-1, 1))
    tracker = MTPLossLoggingHelper.tracker
    mtp = tracker["loss_values" if "loss_values" in tracker else "values"]
    return torch.cat([found.flatten(), mtp.flatten()])


def adapters(chunks: Chunks) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if ".adapter." in name:
                yield name, parameter


def draw(chunks: Chunks) -> None:
    """Adapters as after a training that was long."""
    generator = torch.Generator().manual_seed(5 + torch.distributed.get_rank())
    with torch.no_grad():
        for _, parameter in adapters(chunks):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def another(bridge: AutoBridge, fields: dict[str, Any]) -> Chunks:
    """A model without adapters, of the layout of the first."""
    provider = bridge.to_megatron_provider()
    for name, value in fields.items():
        setattr(provider, name, value)
    provider.pipeline_dtype = torch.float32
    provider.finalize()
    return provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)


def check_start(chunks: Chunks, tokens: torch.Tensor, plain: torch.Tensor) -> None:
    """With B = 0 nothing changes; only adapters are trained, and all of them."""
    found = losses(chunks, tokens)
    assert torch.equal(found, plain), (found - plain).abs().max()
    found[: tokens.numel()].sum().backward()
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            assert parameter.requires_grad == (".adapter." in name), name
            if name.endswith("linear_out.weight"):
                assert parameter.grad.abs().max() > 0, name


def product(exported: dict[str, torch.Tensor], name: str) -> torch.Tensor | float:
    """alpha / dim * B A of a published tensor, or of each expert's part of it."""
    a, b = (
        exported.get(name.removesuffix(".weight") + f".lora_{letter}.weight") for letter in "AB"
    )
    assert (a is None) == (b is None), name
    return 0.0 if a is None or b is None else ALPHA / a.shape[-2] * (b @ a)


def check_exports(
    bridge: AutoBridge, chunks: Chunks, weights: dict[str, torch.Tensor], without: list[str]
) -> None:
    """Merged is base + B A, of each published tensor, both by Megatron-Bridge and by us."""
    merged = dict(bridge.export_hf_weights(chunks, show_progress=False))
    exported = dict(bridge.export_adapter_weights(chunks, show_progress=False))
    base = dict(bridge.export_hf_weights(chunks, show_progress=False, merge_adapter_weights=False))
    base = {name.replace(".base_layer", ""): tensor for name, tensor in base.items()}
    assert merged.keys() == weights.keys() == base.keys()
    assert {"q", "k", "v", "g", "o"} <= {name.split("_proj.lora_A")[0][-1] for name in exported}
    for name, tensor in weights.items():
        assert torch.equal(base[name], tensor), name
        assert close(merged[name], tensor + product(exported, name)), name
    linear = {
        name
        for name in weights
        if not any(part in name for part in ["norm", "router_bias", "embed_tokens", *without])
    }
    adapted = {name.rsplit(".lora_")[0] + ".weight" for name in exported}
    assert adapted == linear, adapted ^ linear

    for choice, expected in (("merged", merged), ("apart", weights)):
        ours = dict(published_tensors_of(chunks, every_stage=True, adapters=choice))
        assert ours.keys() == expected.keys()
        for name, tensor in ours.items():
            assert close(tensor, expected[name]), (choice, name)


def check_folder(folder: Path, exported: dict[str, torch.Tensor], config: Step35Config) -> None:
    """B A of each adapter in a folder for PEFT, multiplied as PEFT does, is the model's."""
    state = load_file(folder / "adapter_model.safetensors")
    document = json.loads((folder / "adapter_config.json").read_text())
    targets = {*document["target_modules"], *document["target_parameters"]}
    found = set()
    for info in published_tensors(config.without_mtp()):
        expected = product(exported, info.name)
        if isinstance(expected, float):
            continue
        place = transformers_place(info)
        name = place.name.removesuffix(".weight")
        target = place.name if name.endswith("mlp.gate") else name
        found.add(target)
        rank = document["rank_pattern"].get(target, document["r"])
        where = name
        if len(info.shape) == 3:  # gate and up have the inner of two wrappers around the experts
            experts, _, last = name.rpartition(".")
            both = f"{experts}.down_proj" in targets and last == "gate_up_proj"
            where = f"{experts}.base_layer" if both else experts
        a, b = (state[f"base_model.model.{where}.lora_{letter}.weight"] for letter in "AB")
        if len(info.shape) == 3:
            a, b = a.reshape(len(expected), rank, -1), b.reshape(len(b), rank, len(expected))
            delta = torch.einsum("o r e, e r i -> e o i", b, a)
        else:
            delta = b @ a
        rows = slice(place.first_row, place.first_row + info.shape[-2])
        scaled = document["lora_alpha"] / rank * delta[..., rows, :]
        assert close(scaled, expected), info.name
    assert found == targets
    assert len(state) == 2 * len(targets)


def check_saved_adapters(
    bridge: AutoBridge, chunks: Chunks, peft: LoRA, config: Step35Config, out: Path
) -> None:
    with pytest.raises(ValueError, match=r"without_mtp: expected True.*\n.*layers\.6\."):
        save_adapters(bridge, chunks, out, peft)
    save_adapters(bridge, chunks, out, peft, without_mtp=True)
    with pytest.raises(FileExistsError):
        save_adapters(bridge, chunks, out, peft, without_mtp=True)
    exported = dict(bridge.export_adapter_weights(chunks, show_progress=False))
    if torch.distributed.get_rank() == 0:
        check_folder(out, exported, config)


def check_refused_without_a_choice(chunks: Chunks, folder: Path, out: Path) -> None:
    for call in (
        lambda: next(published_tensors_of(chunks)),
        lambda: save_hf_weights(chunks, out / "no"),
        lambda: load_hf_weights(chunks, folder),
    ):
        with pytest.raises(ValueError, match=r"adapters: expected .*'apart'.*save_adapters"):
            call()
    assert not (out / "no").exists()


def adapt(folder: str, out: str, gate_layout: str, fields: str, options: str, without: str) -> None:
    """LoRA on every linear layer of a folder's model but some, in one layout.

    Args:
        folder: in the published layout, with tokens.pt.
        out: a folder to write in.
        gate_layout: of the model.
        fields: of the provider, as JSON.
        options: of LoRA, as JSON.
        without: parts of names of published tensors that are to have no adapters, as JSON.
    """
    own = json.loads(fields)
    bridge, chunks = provided(Path(folder), gate_layout, own)
    weights, tokens = (
        load_file(Path(folder, "model.safetensors")),
        torch.load(f"{folder}/tokens.pt"),
    )
    whole = parallel_state.get_pipeline_model_parallel_world_size() == 1
    plain = losses(chunks, tokens) if whole else None
    peft = lora(**json.loads(options))
    chunks = peft(chunks)
    check_adapters(chunks)
    if plain is not None:
        check_start(chunks, tokens, plain)
    draw(chunks)
    check_exports(bridge, chunks, weights, json.loads(without))
    config = Step35Config.from_pretrained(folder)
    check_saved_adapters(bridge, chunks, peft, config, Path(out, "adapters"))
    check_refused_without_a_choice(chunks, Path(folder), Path(out))
    with pytest.raises(NotImplementedError, match="save_adapters"):
        bridge.save_hf_adapter(chunks, f"{out}/no", peft)
    save_hf_weights(chunks, f"{out}/merged", adapters="merged")
    if plain is not None:
        adapted = losses(chunks, tokens)
        assert (adapted - plain).abs().max() > 0.1
        merged = another(bridge, own)
        load_hf_weights(merged, f"{out}/merged")
        found = losses(merged, tokens)
        assert close(found, adapted), (found - adapted).abs().max()


def drop(folder: str) -> None:
    """Experts that read tokens in place call layers with adapters, which may have a dropout."""
    fields = {"transformer_impl": "local"}
    _, chunks = provided(Path(folder), "headwise", fields)
    tokens = torch.load(f"{folder}/tokens.pt")
    plain = losses(chunks, tokens)
    chunks = lora(["linear_fc1", "linear_fc2"], dropout=1.0)(chunks)
    draw(chunks)
    assert torch.equal(losses(chunks, tokens), plain)


def refuse(folder: str, gate_layout: str) -> None:
    """What does not go with the model is refused when the model is made, and when exported."""
    bridge, plain = provided(Path(folder), gate_layout, {})
    for peft, message in (
        (CanonicalLoRA(dim=DIM, alpha=ALPHA), r"linear_qkv: .*CanonicalLoRA.*use LoRA"),
        (DoRA(["linear_qkv", "linear_proj"], dim=DIM), r"linear_qkv: .*DoRA.*use LoRA"),
    ):
        provider = bridge.to_megatron_provider(load_weights=False)
        provider.register_pre_wrap_hook(peft)
        with pytest.raises(ValueError, match=message):
            provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        chunks = peft(another(bridge, {}))
        for export in (bridge.export_hf_weights, bridge.export_adapter_weights):
            with pytest.raises(ValueError, match=message):
                next(iter(export(chunks, show_progress=False)))
        with pytest.raises(ValueError, match=message):
            next(published_tensors_of(chunks, adapters="merged"))
    some = lora(["*.layers.3.*.local_experts.0.linear_fc1"])(plain)
    with pytest.raises(ValueError, match="for some only"):
        list(bridge.export_adapter_weights(some, show_progress=False))


def refuse_places(folder: str) -> None:
    """Where Megatron-Bridge's adapters compute something else on two tensor-parallel ranks."""
    fields = {
        "tensor_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2,
        "sequence_parallel": True,
    }
    bridge, _ = provided(Path(folder), "headwise", fields)
    for place, message in (
        ("router", "router: .*mix"),
        ("linear_fc2", r"expert_tensor_par.* to 1"),
    ):
        chunks = lora([place])(another(bridge, fields))
        with pytest.raises(ValueError, match=message):
            next(iter(bridge.export_hf_weights(chunks, show_progress=False)))


def train(chunks: Chunks, tokens: torch.Tensor) -> None:
    own = [parameter for _, parameter in adapters(chunks)]
    optimizer = torch.optim.SGD(own, lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        losses(chunks, tokens)[: tokens.numel()].mean().backward()
        optimizer.step()


def resume(folder: str, out: str) -> None:
    """The expanded gate is trained as the head-wise one, saved with equal rows, and resumed."""
    bridge, _ = provided(Path(folder), "headwise", {})
    tokens = torch.load(f"{folder}/tokens.pt")
    headwise = lora()(another(bridge, {}))
    expanded = lora()(another(bridge, {"gate_layout": "expanded"}))
    first = dict(adapters(headwise))
    with torch.no_grad():
        for name, parameter in adapters(expanded):
            if name.endswith("linear_in.weight"):
                parameter.copy_(first[name])
    train(headwise, tokens)
    train(expanded, tokens)
    expected = dict(bridge.export_adapter_weights(headwise, show_progress=False))
    for name, tensor in bridge.export_adapter_weights(expanded, show_progress=False):
        assert tensor.abs().max() > 0, name
        assert close(tensor, expected[name]), name

    after = losses(expanded, tokens)
    (chunk,) = expanded
    sharded = {
        name: value for name, value in chunk.sharded_state_dict().items() if ".adapter." in name
    }
    Path(out, "saved").mkdir()
    dist_checkpointing.save(sharded, f"{out}/saved")
    resumed = lora()(another(bridge, {"gate_layout": "expanded"}))
    wanted = {
        name: value
        for name, value in resumed[0].sharded_state_dict().items()
        if ".adapter." in name
    }
    state = dist_checkpointing.load(wanted, f"{out}/saved")
    resumed[0].load_state_dict(state, strict=False)
    assert torch.equal(losses(resumed, tokens), after)

    # As a tool that knows Megatron-Core's own gate alone would have trained them.
    name = "decoder.layers.1.self_attention.linear_qkv.adapter.linear_out.weight"
    state[name] = state[name].clone()
    layout = chunk.decoder.layers[1].self_attention.qkv
    gate_rows(state[name], layout)[:, :, 1:] += 0.1
    with pytest.raises(DriftedGateError, match=r"layer 1: linear_qkv's adapter.*'headwise'"):
        resumed[0].load_state_dict(state, strict=False)
