"""Forward and backward of a sliding layer's core attention on torch, over sequence lengths.

Compared, on the same inputs and the same gradient of the output:

- `step35_patch`: `Step35DotProductAttention`.
- `megatron_core`: Megatron-Core's own local `DotProductAttention`, given the sliding mask (released
  versions build that mask on "cuda" in every forward; here it is made once and not timed).
- `sdpa_full_mask`: `scaled_dot_product_attention` with the S x S boolean mask, also made once.

The shape is one rank's share of the published sliding layer (96 query heads, 8 groups, head
dimension 128, window 512) under tensor parallelism 16: 6 query heads, 1 group, batch 1. At 16k
Megatron-Core's scores of 6 heads do not fit a small machine, so that this length is measured with 1
head also. What does not fit is recorded as out of memory.

Norms of output and gradients must agree in the first round. Peak memory is the largest resident
size during forward and backward, beyond inputs and mask.

Not covered: GPUs, Transformer Engine, masks beyond the window, packed sequences, dropout, the rest
of the layer, and the precision that fp16 and bf16 lose (tests/model/test_windowed_attention.py).

    python benchmarks/sliding_attention.py            # some 15 minutes on 2 cores
    python benchmarks/sliding_attention.py --quick    # 1k and 2k, fp32, a minute; writes no file
"""

from __future__ import annotations

from collections.abc import Callable

import paired
import torch
from torch import Tensor

IMPLEMENTATIONS = ("step35_patch", "megatron_core", "sdpa_full_mask")
WINDOW = 512
HEAD_DIM = 128
GROUPS = 1

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def layer_config(dtype: str, heads: int, **changes):
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=heads * HEAD_DIM,
        num_attention_heads=heads,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        attention_dropout=0.0,
        bf16=dtype == "bfloat16",
        **changes,
    )


def step35_patch(dtype: str, heads: int) -> Attention:
    from megatron.core.transformer.enums import AttnMaskType

    from step35_patch.model.core_attention import Step35DotProductAttention

    config = layer_config(dtype, heads, window_size=(WINDOW - 1, 0))
    module = Step35DotProductAttention(config, 1, AttnMaskType.causal, "self")
    return lambda q, k, v, mask: module(q, k, v, None)


def megatron_core(dtype: str, heads: int) -> Attention:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        # Its score buffer is allocated on this device.
        torch.cuda.current_device = lambda: "cpu"
    parallel_state.get_global_memory_buffer().buffer.clear()
    config = layer_config(dtype, heads)
    # Else it asks for CUDA's generator before a dropout of 0, which draws nothing.
    config.sequence_parallel = True
    return DotProductAttention(config, 1, AttnMaskType.causal, "self")


def sdpa_full_mask(dtype: str, heads: int) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        # One group: its keys serve all heads, by stride, which was faster than enable_gqa.
        key, value = (x.expand(-1, -1, heads, -1) for x in (key, value))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=~mask)
        return out.permute(2, 0, 1, 3).flatten(2)

    return attention


def sliding_mask(s: int) -> Tensor:
    """[1, 1, s, s], True where hidden."""
    visible = torch.ones(s, s, dtype=torch.bool).tril_().triu_(1 - WINDOW)
    return visible.logical_not_()[None, None]


def measure(implementation: str, case: paired.Case) -> paired.Result:
    dtype, heads, s = case["dtype"], case["query_heads"], case["seq_len"]
    attention = globals()[implementation](dtype, heads)
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(s, 1, n, HEAD_DIM, generator=generator).to(getattr(torch, dtype))
        for n in (heads, GROUPS, GROUPS, heads)
    )
    inputs = [x.requires_grad_() for x in (query, key, value)]
    mask = None if implementation == "step35_patch" else sliding_mask(s)
    with paired.PeakMemory() as peak:
        start = paired.clock()
        out = attention(*inputs, mask)
        forward = paired.clock() - start
        out.backward(grad.flatten(2))
        total = paired.clock() - start
    return {
        "forward_s": forward,
        "total_s": total,
        "peak_mib": peak.mib(),
        "check": [x.double().square().sum().item() for x in (out, *(y.grad for y in inputs))],
    }


def case(dtype: str, heads: int, s: int) -> paired.Case:
    return {
        "dtype": dtype,
        "query_heads": heads,
        "groups": GROUPS,
        "head_dim": HEAD_DIM,
        "window": WINDOW,
        "seq_len": s,
    }


DTYPES = ("float32", "bfloat16")

BENCHMARK = paired.Benchmark(
    script=__file__,
    implementations=IMPLEMENTATIONS,
    measure=measure,
    cases=[
        *(case(dtype, 6, s) for dtype in DTYPES for s in (1024, 2048, 4096, 8192, 16384)),
        *(case(dtype, 1, 16384) for dtype in DTYPES),
    ],
    quick=[case("float32", 6, s) for s in (1024, 2048)],
    # Kernels are chosen and set up at first use.
    warm_up=[case(dtype, 2, 1024) for dtype in DTYPES],
    growth=("seq_len",),
)

if __name__ == "__main__":
    paired.main(BENCHMARK)
