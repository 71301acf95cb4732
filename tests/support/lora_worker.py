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
from step35_patch.model.adapters import check_adapters
from step35_patch.tensors.published import published_tensors
from step35_patch.tensors.qkv import DriftedGateError, gate_rows
from step35_patch.tensors.spelling import transformers_place
from support.modelopt_lora import adapt as adapt_as_modelopt
from support.ours import published_gradients

Chunks = list[torch.nn.Module]

EVERY_LINEAR = [
    *("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "router", "eh_proj"),
    *("output_layer", "*mtp_output_heads.*"),
]
QKV = ["linear_q", "linear_g", "linear_k", "linear_v"]
APART = {"linear_qkv": QKV, "linear_fc1": ["linear_fc1_gate", "linear_fc1_up"]}
ALPHA, DIM = 8, 4


def lora(
    target_modules: list[str] = EVERY_LINEAR, kind: str = "lora", **options: Any
) -> LoRA | DoRA | Step35CanonicalLoRA:
    """LoRA, CanonicalLoRA on the parts of the same layers, or DoRA."""
    if kind == "canonical":
        target_modules = [part for name in target_modules for part in APART.get(name, [name])]
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


def exported_adapters(bridge: AutoBridge, chunks: Chunks) -> dict[str, torch.Tensor]:
    """What Megatron-Bridge exports, which are the parameters themselves where it can be."""
    exported = bridge.export_adapter_weights(chunks, show_progress=False)
    return {name: tensor.detach().clone() for name, tensor in exported}


class Adapter:
    """What is exported of one published tensor's adapter."""

    def __init__(self, exported: dict[str, torch.Tensor], name: str):
        stem = name.removesuffix(".weight")
        self.a, self.b = (exported.get(f"{stem}.lora_{letter}.weight") for letter in "AB")
        self.lengths = exported.get(f"{stem}.lora_magnitude_vector")
        assert (self.a is None) == (self.b is None), name

    @property
    def scale(self) -> float:
        return ALPHA / self.a.shape[-2]

    def direction(self, weight: torch.Tensor) -> torch.Tensor:
        """W + alpha / dim * B A, of each expert's part if there are several."""
        return weight if self.a is None else weight + self.scale * (self.b @ self.a)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        whole = self.direction(weight)
        return whole if self.lengths is None else self.by_row(whole) * whole

    def by_row(self, whole: torch.Tensor) -> torch.Tensor:
        """What the rows are multiplied by: [rows, 1]."""
        return (self.lengths / whole.square().sum(1).sqrt())[:, None]

    def gradients(self, weight: torch.Tensor, of_merged: torch.Tensor) -> dict[str, torch.Tensor]:
        """Those of A, B and the lengths, from that of the merged weight, by PEFT's names.

        The length of W + B A is a constant to DoRA.
        """
        found, of_direction = {}, of_merged
        if self.lengths is not None:
            whole = self.direction(weight)
            of_direction = self.by_row(whole) * of_merged
            unit = whole / whole.square().sum(1, keepdim=True).sqrt()
            found["lora_magnitude_vector"] = (of_merged * unit).sum(1)
        found["lora_A.weight"] = self.scale * self.b.mT @ of_direction
        found["lora_B.weight"] = self.scale * of_direction @ self.a.mT
        return found


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


def check_folder(folder: Path, exported: dict[str, torch.Tensor], config: Step35Config) -> None:
    """B A of each adapter in a folder for PEFT, multiplied as PEFT does, is the model's."""
    state = load_file(folder / "adapter_model.safetensors")
    document = json.loads((folder / "adapter_config.json").read_text())
    targets = {*document["target_modules"], *document.get("target_parameters", ())}
    found = set()
    for info in published_tensors(config.without_mtp()):
        adapter = Adapter(exported, info.name)
        if adapter.a is None:
            continue
        expected = adapter.scale * (adapter.b @ adapter.a)
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
        if adapter.lengths is not None:
            magnitudes = state[f"base_model.model.{name}.lora_magnitude_vector"]
            assert torch.equal(magnitudes, adapter.lengths), info.name
    assert found == targets
    assert len(state) == (3 if document["use_dora"] else 2) * len(targets)


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


def check_gradients(
    bridge: AutoBridge,
    chunks: Chunks,
    merged: Chunks,
    weights: dict[str, torch.Tensor],
    exported: dict[str, torch.Tensor],
    tokens: torch.Tensor,
) -> None:
    """The adapters' gradients are what those of a model with merged weights amount to.

    Args:
        chunks: with adapters, as `exported`; whose values become their gradients.
        merged: the same model without them.
        weights: the base's.
    """
    for model in (chunks, merged):
        for chunk in model:
            chunk.zero_grad()
        losses(model, tokens)[: tokens.numel()].sum().backward()
    of_merged = published_gradients(merged[0])
    for _, parameter in adapters(chunks):
        parameter.data = parameter.grad
    found = exported_adapters(bridge, chunks)
    expected: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        adapter = Adapter(exported, name)
        if adapter.a is not None:
            stem = name.removesuffix(".weight")
            for part, gradient in adapter.gradients(weight, of_merged[name]).items():
                expected[f"{stem}.{part}"] = gradient
    assert expected.keys() == found.keys()
    for name, gradient in found.items():
        # What several published tensors, or all experts, have in common is trained by all.
        same = [
            other
            for other in (expected if name.endswith("lora_A.weight") else [name])
            if _layer(other) == _layer(name) and torch.equal(exported[other], exported[name])
        ]
        whole = sum(expected[other] for other in same)
        if whole.dim() == 3 and torch.equal(exported[name][0], exported[name][1]):
            whole = whole.sum(0, keepdim=True).expand_as(whole)
        # Of a whole layer's gradients, sums of 48 tokens' in another order.
        assert (gradient - whole).abs().max() < 1e-4 * whole.abs().max(), name


def _layer(name: str) -> list[str]:
    return name.split(".")[:3]


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
        check_gradients(bridge, chunks, merged, weights, exported, tokens)


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
        ({"target_modules": ["linear_fc2"]}, r"expert_tensor_par.* to 1"),
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
