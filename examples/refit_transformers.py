"""Train Step-3.5, and give a transformers model the new weights after each step.

    torchrun --nproc-per-node 4 refit_transformers.py HF_DIR \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

What trainers for reinforcement learning do with their inference engine: nothing is written to disk,
and no more than the largest tensor is in memory beside the two models. The transformers model is on
rank 0; an engine with `load_weights(iterator)`, such as vLLM's models have, takes the iterator as
it is, on each rank that it runs on. Without a GPU it all runs on the CPU.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch

if not torch.cuda.is_available():
    from step35_patch import cpu

    cpu.install()  # before Megatron-Core is imported

from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

from step35_patch import Step35Config, Step35ModelProvider
from step35_patch.checkpoint import load_hf_weights, published_tensors_of

LENGTH, MICRO_BATCHES = 32, 2
# Published names within a layer, and what transformers calls the same.
RENAMED = {
    "moe.gate.weight": "mlp.gate.weight",
    "moe.router_bias": "mlp.gate.e_score_correction_bias",
    "moe.down_proj.weight": "mlp.experts.down_proj",
    "share_expert.": "mlp.shared_experts.",
}


class Engine:
    """transformers' text model with its output matrix, whose weights are exchanged in place.

    transformers has no MTP layers for it: what it is given of theirs is left out.
    """

    def __init__(self, hf_dir: Path, dtype: torch.dtype):
        fields = json.loads((hf_dir / "config.json").read_text())
        config = Step3p7TextConfig(**{n: v for n, v in fields.items() if n != "model_type"})
        self.layers = config.num_hidden_layers
        self.model = Step3p7TextModel(config).to(dtype)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, False, dtype=dtype)
        self.places = self.model.state_dict(keep_vars=True)

    @torch.no_grad()
    def take(self, name: str, tensor: torch.Tensor) -> None:
        """Copy one published tensor to its place."""
        place = self._place(name)
        if place is not None:
            place.copy_(tensor)

    def _place(self, name: str) -> torch.Tensor | None:
        if name == "lm_head.weight":
            return self.lm_head.weight
        name = name.removeprefix("model.")
        kind, *rest = name.split(".")
        if kind == "layers" and int(rest[0]) >= self.layers:
            return None
        for published, own in RENAMED.items():
            name = name.replace(published, own)
        for half, part in enumerate(("moe.gate_proj.weight", "moe.up_proj.weight")):
            if name.endswith(part):  # one tensor with both, experts first: [E, 2 I, H]
                both = self.places[name.replace(part, "mlp.experts.gate_up_proj")]
                return both.chunk(2, dim=1)[half]
        return self.places[name]

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[b, s] -> [b, s, vocabulary], of the weights as they are now."""
        return self.lm_head(self.model(input_ids=tokens, use_cache=False).last_hidden_state)


def loss_of(labels, losses):
    """Put your own in its place: the model returns logits if it is given no labels."""
    return losses.mean(), {"loss": losses.detach().mean()}


def forward_step(batches, model):
    """One micro-batch of random tokens through the model."""
    tokens = next(batches)
    positions = torch.arange(LENGTH, device=tokens.device)[None]
    labels = tokens[:, 1:].contiguous()
    return model(tokens[:, :-1], positions, None, labels=labels), partial(loss_of, labels)


def training_steps(provider, hf_dir, steps):
    """Megatron's own schedule and optimizer; yields the wrapped model after each step."""
    model = provider.provide(
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    ).cuda()
    load_hf_weights(model, hf_dir)
    if provider.bf16:
        model = Float16Module(provider, model)
    model = DistributedDataParallel(provider, DistributedDataParallelConfig(), model)
    model.train()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1e-3, bf16=provider.bf16, params_dtype=provider.params_dtype
        ),
        [model],
    )
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    provider.finalize_model_grads_func = finalize_model_grads
    generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    for _ in range(steps):
        size = (MICRO_BATCHES, 1, LENGTH + 1)
        tokens = torch.randint(1, provider.vocab_size, size, generator=generator).cuda()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(tokens),
            model=[model],
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()
        yield model


def main(arguments=None, after_each_step=lambda model, engine: None):
    """Train and refit; `after_each_step` is called on every rank, with the engine on rank 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("hf_dir", type=Path)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--expert-model-parallel-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    options = vars(parser.parse_args(arguments))
    hf_dir, steps = options.pop("hf_dir"), options.pop("steps")
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group()
    dtype = getattr(torch, Step35Config.from_pretrained(hf_dir).torch_dtype)
    provider = Step35ModelProvider.from_hf(
        hf_dir,
        **options,
        sequence_parallel=options["tensor_model_parallel_size"] > 1,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        moe_token_dispatcher_type="alltoall",
        use_cpu_initialization=True,
        perform_initialization=False,  # all weights are loaded
    )
    parallel_state.initialize_model_parallel(
        **options, get_embedding_ranks=provider.embedding_ranks
    )
    model_parallel_cuda_manual_seed(1)
    engine = Engine(hf_dir, dtype) if torch.distributed.get_rank() == 0 else None
    for number, model in enumerate(training_steps(provider, hf_dir, steps)):
        # All ranks go through all tensors, because they are gathered on the way.
        for name, tensor in published_tensors_of(model, every_stage=True):
            if engine is not None:
                engine.take(name, tensor)
        if engine is not None:
            greedy = engine.logits(torch.arange(1, 17)[None]).argmax(-1)
            print(f"step {number + 1}: refitted, greedy tokens {greedy.tolist()}", flush=True)
        after_each_step(model, engine)


if __name__ == "__main__":
    main()
