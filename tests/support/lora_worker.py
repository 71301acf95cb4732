"""What ranks do with Megatron-Bridge's LoRA for tests/bridge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The first to import Megatron-Bridge, on a CPU.
from support.bridge_worker import provided

import pytest  # noqa: E402  isort: skip
import torch  # noqa: E402
from megatron.bridge import AutoBridge  # noqa: E402
from megatron.bridge.peft.canonical_lora import CanonicalLoRA  # noqa: E402
from megatron.bridge.peft.dora import DoRA  # noqa: E402
from megatron.bridge.peft.lora import LoRA  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from step35_patch.checkpoint import (  # noqa: E402
    load_hf_weights,
    published_tensors_of,
    save_hf_weights,
)

Chunks = list[torch.nn.Module]

EVERY_LINEAR = [
    *("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "router", "eh_proj"),
    *("output_layer", "*mtp_output_heads.*"),
]
ALPHA, DIM = 8, 4


def lora(targets: list[str] = EVERY_LINEAR, **options: Any) -> LoRA:
    return LoRA(target_modules=list(targets), dim=DIM, alpha=ALPHA, **options)


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


def check_exports(bridge: AutoBridge, chunks: Chunks, weights: dict[str, torch.Tensor]) -> None:
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
    linear = {name for name in weights if "norm" not in name and "router_bias" not in name}
    linear.remove("model.embed_tokens.weight")
    adapted = {name.rsplit(".lora_")[0] + ".weight" for name in exported}
    assert adapted == linear, adapted ^ linear

    for choice, expected in (("merged", merged), ("apart", weights)):
        ours = dict(published_tensors_of(chunks, every_stage=True, adapters=choice))
        assert ours.keys() == expected.keys()
        for name, tensor in ours.items():
            assert close(tensor, expected[name]), (choice, name)


def check_refused_without_a_choice(chunks: Chunks, folder: Path, out: Path) -> None:
    for call in (
        lambda: next(published_tensors_of(chunks)),
        lambda: save_hf_weights(chunks, out / "no"),
        lambda: load_hf_weights(chunks, folder),
    ):
        with pytest.raises(ValueError, match=r"adapters: expected .*'apart'.*save_hf_adapter"):
            call()
    assert not (out / "no").exists()


def adapt(folder: str, out: str, gate_layout: str, fields: str, options: str) -> None:
    """LoRA on every linear layer of a folder's model, in one layout."""
    own = json.loads(fields)
    bridge, chunks = provided(Path(folder), gate_layout, own)
    weights, tokens = load_file(Path(folder, "model.safetensors")), torch.load(f"{folder}/tokens.pt")
    whole = parallel_state.get_pipeline_model_parallel_world_size() == 1
    plain = losses(chunks, tokens) if whole else None
    chunks = lora(**json.loads(options))(chunks)
    if plain is not None:
        check_start(chunks, tokens, plain)
    draw(chunks)
    check_exports(bridge, chunks, weights)
    check_refused_without_a_choice(chunks, Path(folder), Path(out))
    save_hf_weights(chunks, f"{out}/merged", adapters="merged")
    if plain is not None:
        adapted = losses(chunks, tokens)
        assert (adapted - plain).abs().max() > 0.1
        merged = another(bridge, own)
        load_hf_weights(merged, f"{out}/merged")
        found = losses(merged, tokens)
        assert close(found, adapted), (found - adapted).abs().max()


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
