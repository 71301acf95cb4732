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
from step35_patch.bridge import Step35CanonicalLoRA, save_adapters
from step35_patch.checkpoint import (
    load_hf_weights,
    published_tensors_of,
    save_hf_weights,
)
from step35_patch.model.adapters import adapted_modules, check_adapters
from step35_patch.tensors.qkv import DriftedGateError, gate_rows
from support.exported_adapters import (
    ALPHA,
    DIM,
    Adapter,
    check_folder,
    check_gradients,
    close,
)
from support.modelopt_lora import adapt as adapt_as_modelopt
from support.ours import published_gradients

Chunks = list[torch.nn.Module]

EVERY_LINEAR = [
    *("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "router", "eh_proj"),
    *("output_layer", "*mtp_output_heads.*"),
]
QKV = ["linear_q", "linear_g", "linear_k", "linear_v"]
APART = {"linear_qkv": QKV, "linear_fc1": ["linear_fc1_gate", "linear_fc1_up"]}


def apart(name: str) -> list[str]:
    """The targets of CanonicalLoRA in place of one of LoRA's."""
    where, dot, last = name.rpartition(".")
    return [where + dot + part for part in APART.get(last, [last])]


def lora(
    target_modules: list[str] = EVERY_LINEAR, kind: str = "lora", **options: Any
) -> LoRA | DoRA | Step35CanonicalLoRA:
    """LoRA, CanonicalLoRA on the parts of the same layers, or DoRA."""
    if kind == "canonical":
        target_modules = [part for name in target_modules for part in apart(name)]
    made = {"lora": LoRA, "dora": DoRA, "canonical": Step35CanonicalLoRA}[kind]
    return made(target_modules=list(target_modules), dim=DIM, alpha=ALPHA, **options)


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


def exported_adapters(bridge: AutoBridge, chunks: Chunks) -> dict[str, torch.Tensor]:
    """What Megatron-Bridge exports, which are the parameters themselves where it can be."""
    exported = bridge.export_adapter_weights(chunks, show_progress=False)
    return {name: tensor.detach().clone() for name, tensor in exported}


def check_exports(
    bridge: AutoBridge,
    chunks: Chunks,
    weights: dict[str, torch.Tensor],
    without: list[str],
    kind: str,
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
        assert close(merged[name], Adapter(exported, name).merged(tensor)), name
    linear = {
        name
        for name in weights
        if not any(part in name for part in ["norm", "router_bias", "embed_tokens", *without])
    }
    assert any("lora_magnitude" in name for name in exported) == (kind == "dora")
    adapted = {name.rsplit(".lora_")[0] + ".weight" for name in exported}
    assert adapted == linear, adapted ^ linear

    for choice, expected in (("merged", merged), ("apart", weights)):
        ours = dict(published_tensors_of(chunks, every_stage=True, adapters=choice))
        assert ours.keys() == expected.keys()
        for name, tensor in ours.items():
            assert close(tensor, expected[name]), (choice, name)


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
    asked = json.loads(options)
    peft, kind = lora(**asked), asked.get("kind", "lora")
    chunks = peft(chunks)
    check_adapters(chunks)
    if plain is not None:
        check_start(chunks, tokens, plain)
    draw(chunks)
    check_exports(bridge, chunks, weights, json.loads(without), kind)
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
        with torch.no_grad():
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            torch.save(chunks[0].eval()(tokens, positions, None), f"{out}/logits.pt")
        exported = exported_adapters(bridge, chunks)
        if kind == "canonical":
            check_checkpoint(chunks, exported, Path(out, "saved"))
        for model in (chunks, merged):
            model[0].zero_grad()
            losses(model, tokens)[: tokens.numel()].sum().backward()
        for _, parameter in adapters(chunks):
            parameter.data = parameter.grad
        found = exported_adapters(bridge, chunks)
        check_gradients(found, published_gradients(merged[0]), weights, exported)


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
    canonical, message = CanonicalLoRA(dim=DIM, alpha=ALPHA), r"linear_qkv: .*Step35CanonicalLoRA"
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.register_pre_wrap_hook(canonical)
    with pytest.raises(ValueError, match=message):
        provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    chunks = canonical(another(bridge, {}))
    for export in (bridge.export_hf_weights, bridge.export_adapter_weights):
        with pytest.raises(ValueError, match=message):
            next(iter(export(chunks, show_progress=False)))
    with pytest.raises(ValueError, match=message):
        next(published_tensors_of(chunks, adapters="merged"))

    for peft, message in (
        (lora(["linear_fc1"], "dora"), r"local_experts\.0\.linear_fc1: .*no DoRA on routed"),
        (lora(["router"], "dora"), r"mlp\.router: .*no DoRA on .*routers"),
        (lora(["output_layer"], "dora"), r"output_layer: .*no DoRA on output matrices"),
        (lora(["linear_qkv"], "dora", dropout=0.5), r"linear_qkv: .*found 0\.5.*set dropout to 0"),
    ):
        with pytest.raises(ValueError, match=message):
            check_adapters(peft(another(bridge, {})))
    grouped = another(bridge, {"moe_grouped_gemm": True})
    with pytest.raises(ValueError, match=r"experts\.linear_fc1: .*use share_expert_adapters"):
        check_adapters(lora(["linear_fc1"], experts_shared_outer_loras=True)(grouped))
    in_place = adapt_as_modelopt(another(bridge, {"transformer_impl": "local"})[0])
    with pytest.raises(ValueError, match=r"ModelOpt's on .*adapters='merged'"):
        next(iter(bridge.export_hf_weights([in_place], show_progress=False)))
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
        ({"target_modules": ["router"]}, "router: .*mix"),
        ({"target_modules": ["*.experts.*.linear_fc1"]}, r"expert_tensor_par.* to 1"),
        ({"target_modules": ["linear_qkv"]}, "linear_qkv: .*set sequence_parallel_input_reg"),
        (
            {"target_modules": ["linear_qkv"], "kind": "dora"},
            "linear_qkv: .*no DoRA with tensor_model_parallel_size 2",
        ),
    ):
        chunks = lora(**place)(another(bridge, fields))
        with pytest.raises(ValueError, match=message):
            next(iter(bridge.export_hf_weights(chunks, show_progress=False)))


def train(chunks: Chunks, tokens: torch.Tensor) -> None:
    own = [parameter for _, parameter in adapters(chunks)]
    optimizer = torch.optim.SGD(own, lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        losses(chunks, tokens)[: tokens.numel()].mean().backward()
        optimizer.step()


def resume(folder: str, out: str, dense: str) -> None:
    """The expanded gate is trained as the head-wise one, saved with equal rows, and resumed.

    Args:
        folder: in the published layout, with tokens.pt.
        out: a folder to write in.
        dense: the layers that DoRA can be on, as JSON.
    """
    bridge, _ = provided(Path(folder), "headwise", {})
    tokens = torch.load(f"{folder}/tokens.pt")
    for peft in (lora(), lora(kind="canonical"), lora(json.loads(dense), "dora")):
        resume_one(bridge, tokens, Path(out, type(peft).__name__), peft)


def resume_one(bridge: AutoBridge, tokens: torch.Tensor, out: Path, peft: Any) -> None:
    expanded_gate = {"gate_layout": "expanded"}
    headwise, expanded = peft(another(bridge, {})), peft(another(bridge, expanded_gate))
    first = dict(adapters(headwise))
    with torch.no_grad():
        for name, parameter in adapters(expanded):
            if name.endswith("linear_in.weight"):
                parameter.copy_(first[name])
    train(headwise, tokens)
    train(expanded, tokens)
    expected = exported_adapters(bridge, headwise)
    for name, tensor in exported_adapters(bridge, expanded).items():
        assert tensor.abs().max() > 0, name
        assert close(tensor, expected[name]), name

    after = losses(expanded, tokens)
    (chunk,) = expanded
    out.mkdir()
    dist_checkpointing.save(of_adapters(chunk.sharded_state_dict()), out)
    (resumed,) = peft(another(bridge, expanded_gate))
    state = dist_checkpointing.load(of_adapters(resumed.sharded_state_dict()), out)
    resumed.load_state_dict(state, strict=False)
    assert torch.equal(losses([resumed], tokens), after)
    # They are the parameters themselves.
    state = {name: value.clone() for name, value in state.items() if torch.is_tensor(value)}

    # As a tool that knows Megatron-Core's own gate alone would have trained them.
    linear_qkv = "decoder.layers.1.self_attention.linear_qkv.adapter."
    for name in {"linear_out.weight", "weight_magnitude"}:
        if linear_qkv + name not in state:
            continue
        drifted = state[linear_qkv + name].clone()
        layout = chunk.decoder.layers[1].self_attention.qkv
        gate_rows(drifted.view(len(drifted), -1), layout)[:, :, 1:] += 0.1
        with pytest.raises(DriftedGateError, match=r"layer 1: linear_qkv's adapter.*'headwise'"):
            resumed.load_state_dict(state | {linear_qkv + name: drifted}, strict=False)

    # Megatron-Bridge's wrappers leave their own names out of what they save, and load by them.
    with pytest.raises(RuntimeError, match=r"Missing key.*linear_qkv\.to_wrap\.weight"):
        resumed.load_state_dict(resumed.state_dict(), strict=True)
    missing = resumed.load_state_dict(resumed.state_dict(), strict=False).missing_keys
    assert {name.rpartition(".to_wrap.")[0] for name in missing} == {*adapted_modules([resumed])}


def of_adapters(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if ".adapter." in name}


def check_checkpoint(chunks: Chunks, exported: dict[str, torch.Tensor], out: Path) -> None:
    """A checkpoint has B of each published matrix whole, whatever the tensor-parallel size."""
    (chunk,) = chunks
    if torch.distributed.get_rank() == 0:
        out.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(of_adapters(chunk.sharded_state_dict()), out)
    saved = dist_checkpointing.load_plain_tensors(out)
    layer, published = "decoder.layers.1.", "model.layers.1."
    for linear, parts, where in (
        ("self_attention.linear_qkv", "qgkv", "self_attn."),
        ("mlp.linear_fc1", ["gate", "up"], "mlp."),
    ):
        for part in parts:
            found = saved[f"{layer}{linear}.adapter.adapter_{part}.linear_out.weight"]
            assert torch.equal(found, exported[f"{published}{where}{part}_proj.lora_B.weight"])
