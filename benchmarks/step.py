"""Forward and backward of a whole step on torch, against transformers and stock Megatron-Core.

The small model of models.py: hidden size 512, 8 layers (2 full, 6 sliding with window 512), 8 and
12 heads of 128 channels on one group, 32 experts of which a token takes 8, fp32, batch 1.

- `step35_patch`: this package's model on Megatron-Core's local implementation.
- `floor`: the time in which this machine, in the same round, multiplies matrices of this model's
  width with as many operations as the step has. They are counted by `step35_patch.costs`: visible
  pairs of queries and keys alone, backward twice the forward. No program reaches it.
- `transformers_sdpa`, `transformers_eager`: `Step3p7TextModel` with the same weights; losses must
  agree.
- `megatron_gpt`: stock GPTModel of the same shape, as far as it goes (models.py): full attention
  with 8 heads and no gate in all layers, no clamp.
- `megatron_gpt_attention`: the same with this package's core attention, full as well.

`kept_mib` is what autograd keeps for backward beyond parameters, each storage once.

Each timed step follows one that is not, whose memory it uses again, as the second step of a
training run does and all after it: glibc is told to give none back between the two.

Not covered: GPUs, Transformer Engine, optimizers, several processes or threads.

    python benchmarks/step.py --memory-gib 12   # an hour on one core
    python benchmarks/step.py --quick           # some minutes; writes no file
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import paired
import torch

# The mean loss, from tokens [1, s] and labels [1, s].
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

SEED = 7
_made: dict[str, tuple[Loss, torch.nn.Module]] = {}
_kept: dict[int, float] = {}


def _published_weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    from support.reference import random_weights

    return random_weights(config, SEED)


def _of_megatron(model: torch.nn.Module) -> Loss:
    model.train()

    def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.size(1))[None]
        return model(tokens, positions, None, labels=labels).mean()

    return loss


def step35_patch(config: dict[str, Any]) -> tuple[Loss, torch.nn.Module]:
    models.prepare()
    from support.ours import build
    from support.reference import write_hf_folder

    with tempfile.TemporaryDirectory() as folder:
        written = write_hf_folder(Path(folder, "hf"), config, _published_weights(config))
        model = build(written)
    return _of_megatron(model), model


def _transformers(config: dict[str, Any], attention: str) -> tuple[Loss, torch.nn.Module]:
    from support.reference import Reference

    reference = Reference(config, _published_weights(config))
    state = {
        "embed_tokens.weight": reference.parameters["model.embed_tokens.weight"],
        "norm.weight": reference.parameters["model.norm.weight"],
    }
    for index in range(config["num_hidden_layers"]):
        state |= reference._layer_weights(index, f"layers.{index}.")
    body = type(reference.model)(reference.model.config)
    body.load_state_dict({name: tensor.detach() for name, tensor in state.items()})
    body.set_attn_implementation(attention)
    head = torch.nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
    head.weight.data.copy_(reference.parameters["lm_head.weight"])
    model = torch.nn.ModuleDict({"body": body, "head": head}).train()

    def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = body(input_ids=tokens, use_cache=False).last_hidden_state
        return torch.nn.functional.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())

    return loss, model


def transformers_sdpa(config: dict[str, Any]) -> tuple[Loss, torch.nn.Module]:
    return _transformers(config, "sdpa")


def transformers_eager(config: dict[str, Any]) -> tuple[Loss, torch.nn.Module]:
    return _transformers(config, "eager")


def megatron_gpt(config: dict[str, Any]) -> tuple[Loss, torch.nn.Module]:
    models.prepare()
    model = models.stock_gpt(config, use_cpu_initialization=True)
    return _of_megatron(model), model


def megatron_gpt_attention(config: dict[str, Any]) -> tuple[Loss, torch.nn.Module]:
    loss, model = megatron_gpt(config)
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from step35_patch.model.core_attention import Step35DotProductAttention

    for layer in model.decoder.layers:
        stock = layer.self_attention.core_attention
        assert isinstance(stock, DotProductAttention)
        layer.self_attention.core_attention = Step35DotProductAttention(
            dataclasses.replace(stock.config), layer.layer_number, stock.attn_mask_type, "self"
        )
    return loss, model


def kept_mib(loss: Callable[[], torch.Tensor], model: torch.nn.Module) -> float:
    """What a forward pass keeps for its backward."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # holding it keeps its address from being used again
        storages[storage.data_ptr()] = storage
        return tensor.detach()  # an output that kept itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss()
    return sum(s.nbytes() for pointer, s in storages.items() if pointer not in own) / 2**20


def operations(config: dict[str, Any], tokens: int) -> float:
    from step35_patch import Step35Config
    from step35_patch.costs.accounting import training_flops

    return training_flops(
        Step35Config.from_dict(config),
        tokens=tokens,
        squared_lengths=tokens**2,
        vocab_size=config["vocab_size"],
        mtp_layers=0,
    )


def floor(config: dict[str, Any], tokens: int) -> paired.Result:
    """From a second of a linear layer's three products: output, and gradients of both factors."""
    hidden, width = config["hidden_size"], 2 * config["hidden_size"]
    x, weight, grad = (
        torch.randn(*size) for size in ((2048, hidden), (width, hidden), (2048, width))
    )
    done, start = 0, paired.clock()
    while (spent := paired.clock() - start) < 1.0:
        x @ weight.t(), grad @ weight, grad.t() @ x
        done += 3
    rate = done * 2 * 2048 * hidden * width / spent
    seconds = operations(config, tokens) / rate
    return {"forward_s": seconds / 3, "total_s": seconds, "peak_mib": 0.0, "kept_mib": 0.0}


def measure(implementation: str, case: paired.Case) -> paired.Result:
    config, tokens = models.small(), case["seq_len"]
    if implementation == "floor":
        return floor(config, tokens)
    if implementation not in _made:
        _made[implementation] = globals()[implementation](config)
    try:
        return _measure(implementation, *_made[implementation], tokens)
    except RuntimeError:
        # Megatron-Core's token dispatchers hold the last forward's tensors, and so all of its
        # graph where no backward has freed it.
        del _made[implementation]
        raise


def _measure(implementation: str, loss: Loss, model: torch.nn.Module, tokens: int) -> paired.Result:
    config = models.small()
    generator = torch.Generator().manual_seed(SEED)
    # Without the last token, to which transformers gives no gradient (pad_token_id).
    ids = torch.randint(0, config["vocab_size"] - 1, (1, tokens + 1), generator=generator)
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    if tokens not in _kept:
        _kept[tokens] = kept_mib(lambda: loss(inputs, labels), model)
    model.zero_grad(set_to_none=True)
    with paired.PeakMemory() as peak:
        loss(inputs, labels).backward()
        peak_mib = peak.mib()
    model.zero_grad(set_to_none=True)
    start = paired.clock()
    value = loss(inputs, labels)
    forward = paired.clock() - start
    value.backward()
    total = paired.clock() - start
    ctypes.CDLL(None).malloc_trim(0)  # the next process needs the room
    result: paired.Result = {
        "forward_s": forward,
        "total_s": total,
        "peak_mib": peak_mib,
        "kept_mib": _kept[tokens],
    }
    if not implementation.startswith("megatron"):  # another model
        result["check"] = [value.item()]
    return result


def case(tokens: int) -> paired.Case:
    return {"dtype": "float32", "seq_len": tokens}


BENCHMARK = paired.Benchmark(
    script=__file__,
    implementations=(
        "step35_patch",
        "floor",
        "transformers_sdpa",
        "transformers_eager",
        "megatron_gpt",
        "megatron_gpt_attention",
    ),
    measure=measure,
    cases=[case(tokens) for tokens in (1024, 2048, 4096, 8192)],
    quick=[case(512), case(1024)],
    rounds=3,
    growth=("seq_len",),
    packages=("megatron.core", "transformers"),
)

if __name__ == "__main__":
    # See mallopt(3). The processes that measure inherit it. The first is where glibc ends up by
    # itself; with more, all six would not fit into 24 GiB.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    paired.main(BENCHMARK)
