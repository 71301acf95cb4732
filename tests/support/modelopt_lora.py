"""LoRA as ModelOpt puts it into a model, by ModelOpt itself or by layers of the same shape."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

RANK, SCALE = 4, 2.0


class _Lora:
    """ModelOpt's LoRAModule, which it mixes into a layer's own class."""

    _lora_adapters: dict[str, dict[str, Any]]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, *rest = super().forward(x, *args, **kwargs)
        for pair in self._lora_adapters.values():
            if pair["enable"]:
                output = output + pair["scale"] * pair["lora_b"](pair["lora_a"](x))
        return (output, *rest)


def adapt(model: torch.nn.Module) -> torch.nn.Module:
    """The model with adapters of that shape on Megatron-Core's linear layers, B = 0."""
    for layer in [*model.modules()]:
        if not isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            continue
        rows, columns = layer.weight.shape
        layer.__class__ = type("_LoRA", (_Lora, type(layer)), {})
        a, b = torch.nn.Linear(columns, RANK, bias=False), torch.nn.Linear(RANK, rows, bias=False)
        torch.nn.init.zeros_(b.weight)
        layer.lora_a_default, layer.lora_b_default = a, b
        pair = {"lora_a": a, "lora_b": b, "rank": RANK, "scale": SCALE, "enable": True}
        layer._lora_adapters = {"default": pair}
    return model


def adapt_by_modelopt(model: torch.nn.Module) -> torch.nn.Module:
    """The same by ModelOpt."""
    from modelopt.torch import peft

    setting = {"rank": RANK, "scale": SCALE, "enable": True}
    return peft.update_model(
        model,
        {"adapter_type": "lora", "adapter_name": "default", "adapter_cfg": {"*": setting}},
    )
