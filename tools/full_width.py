"""Each kind of layer at the model's full width in bf16, forward and backward, on one device.

    python tools/full_width.py                 # the published widths, on a GPU
    python tools/full_width.py --tiny          # the tests' tiny config, on whatever is there

Three runs of the same layer with the same random weights and tokens: transformers' in fp32, which
is taken for true, transformers' in bf16, and this package's in bf16. Ours may be as far from the
first as bf16 itself puts the second, and a little more, in logits and in every gradient. A line of
JSON for each kind goes to standard output; the exit status is 1 if one is off.

STEP35_TEST_IMPLEMENTATION=transformer_engine takes Transformer Engine's layers, with its own
kernels where there is a GPU. A MoE layer of the published width needs some 70 GB on the GPU, and
64 GB of the machine; --experts makes it smaller.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# How much farther from fp32 than transformers' own bf16: sums are taken in another order.
ALLOWED = 2.0
# Below this both are rounding alone.
FLOOR = 2e-3
PER_LAYER = (
    *("layer_types", "rope_theta", "partial_rotary_factors"),
    *("swiglu_limits", "swiglu_limits_shared"),
)


def kinds(config: dict[str, Any]) -> dict[str, int]:
    """The first layer of each kind, by its name."""
    from step35_patch import Step35Config

    found: dict[str, int] = {}
    for plan in Step35Config.from_dict(config).layers:
        clamped = bool(plan.swiglu_limit or plan.swiglu_limit_shared)
        name = ", ".join(
            [
                "MTP" if plan.is_mtp else plan.attention_type.replace("_attention", ""),
                "MoE" if plan.is_moe else "dense",
                *["clamped"] * clamped,
            ]
        )
        found.setdefault(name, plan.index)
    return found


def alone(config: dict[str, Any], index: int) -> dict[str, Any]:
    """A config of that layer and no other; of an MTP layer behind the first layer."""
    depth = config["num_hidden_layers"]
    indices = [index] if index < depth else [0, index]
    moe = config["moe_layers_enum"]
    moe = {int(i) for i in moe.split(",")} if isinstance(moe, str) else set(moe)
    return config | {
        "num_hidden_layers": 1,
        "num_nextn_predict_layers": len(indices) - 1,
        "moe_layers_enum": [0] if indices[0] in moe else [],
        "use_moe": indices[0] in moe,
        **{
            name: [config[name][i] for i in indices]
            for name in PER_LAYER
            if isinstance(config.get(name), list)
        },
    }


def distance(found: torch.Tensor, true: torch.Tensor) -> float:
    """Relative, in the L2 norm."""
    norm = true.float().norm().item()
    return (found.float() - true.float()).norm().item() / norm if norm else 0.0


def reference_run(
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    tokens: tuple[torch.Tensor, torch.Tensor],
    device: str,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Logits and gradients of transformers' layer, on the CPU."""
    from support.reference import Reference

    with torch.device(device):
        reference = Reference(config, {n: w.to(device) for n, w in weights.items()}, dtype)
        logits, loss, mtp_losses = reference.losses(*(part.to(device) for part in tokens))
        total = loss + 0.1 * sum(mtp_losses) / max(len(mtp_losses), 1)
        total.backward()
    found = {"logits": logits.detach().cpu()}
    return found | {name: grad.cpu() for name, grad in reference.gradients().items()}


def our_run(
    folder: Path, tokens: tuple[torch.Tensor, torch.Tensor], device: str, **changes: Any
) -> dict[str, torch.Tensor]:
    """The same of this package's; `changes` are fields of its provider."""
    from support.ours import build, published_gradients, run

    bf16 = {"bf16": True, "params_dtype": torch.bfloat16, "mtp_loss_scaling_factor": 0.1}
    model = build(folder, **bf16, **changes).to(device)
    model.train()
    with torch.device(device):
        input_ids, labels = (part.to(device) for part in tokens)
        logits = run(model, input_ids).detach().cpu()
        run(model, input_ids, labels).float().mean().backward()
    found = {"logits": logits}
    return found | {name: grad.cpu() for name, grad in published_gradients(model).items()}


def compared(
    config: dict[str, Any], length: int, device: str, seed: int = 0, **changes: Any
) -> Iterator[dict[str, Any]]:
    """A row for each kind of layer: the worst of what is farther from fp32 than bf16 puts it."""
    from support.reference import random_tokens, random_weights, write_hf_folder

    for name, index in kinds(config).items():
        part = alone(config, index)
        weights = {
            key: value if key.endswith("router_bias") else value.bfloat16()
            for key, value in random_weights(part, seed).items()
        }
        tokens = random_tokens(seed, 1, length)
        true = reference_run(part, weights, tokens, device, torch.float32)
        _free()
        theirs = reference_run(part, weights, tokens, device, torch.bfloat16)
        _free()
        with tempfile.TemporaryDirectory() as folder:
            write_hf_folder(Path(folder), part, weights)
            del weights
            ours = our_run(Path(folder), tokens, device, **changes)
        _free()
        vocabulary = true["logits"].shape[-1]
        ours["logits"] = ours["logits"][..., :vocabulary]
        rows = []
        for what, exact in true.items():
            own, bf16 = distance(ours[what], exact), distance(theirs[what], exact)
            rows.append((own / max(bf16, FLOOR), what, own, bf16))
        ratio, what, own, bf16 = max(rows)
        yield {
            "kind": name,
            "layer": index,
            "tokens": length,
            "compared": len(rows),
            "logits": distance(ours["logits"], true["logits"]),
            "logits_of_bf16": distance(theirs["logits"], true["logits"]),
            "worst": what,
            "off": own,
            "off_of_bf16": bf16,
            "ratio": ratio,
            "agrees": ratio <= ALLOWED,
        }


def _free() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare layers of full width in bf16.")
    parser.add_argument("--tiny", action="store_true", help="the tests' tiny config")
    parser.add_argument("--experts", type=int, help="of a MoE layer (published: 288)")
    parser.add_argument("--tokens", type=int, default=1536, help="many windows (1536)")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu and not arguments.tiny:
        parser.error("expected a GPU for the published widths, found none; --tiny runs anywhere")
    from support import implementation

    if not gpu:
        implementation.install()
    from support.reference import PAD_TOKEN, tiny_config

    import step35_patch
    from step35_patch.config import packaged_config_path

    step35_patch.activate()
    if arguments.tiny:
        config = tiny_config(torch_dtype="bfloat16")
    else:
        config = json.loads(Path(packaged_config_path()).read_text())
        # The embedding and the output matrix are no part of a layer.
        config |= {"vocab_size": PAD_TOKEN + 1, "pad_token_id": PAD_TOKEN}
        config["moe_num_experts"] = arguments.experts or config["moe_num_experts"]
    agree = True
    for row in compared(config, arguments.tokens, "cuda" if gpu else "cpu"):
        print(json.dumps(row), flush=True)
        agree &= row["agrees"]
    return int(not agree)


if __name__ == "__main__":
    sys.exit(main())
