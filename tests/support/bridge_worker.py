"""What ranks do with Megatron-Bridge for tests/bridge."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from support import bridge_on_cpu

bridge_on_cpu.install()

import torch  # noqa: E402
from megatron.bridge import AutoBridge  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import step35_patch  # noqa: E402
from step35_patch.bridge import Step35Bridge, Step35BridgeProvider, Step35CanonicalLoRA  # noqa: E402

# Tokens of a sequence in training: beyond the window.
LENGTH = 24


def start() -> None:
    """torch.distributed, as Megatron-Bridge expects to find it or else starts it with NCCL."""
    if int(os.environ["WORLD_SIZE"]) > 1:
        torch.distributed.init_process_group("gloo")
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def provided(
    folder: Path, gate_layout: str, fields: dict[str, Any]
) -> tuple[AutoBridge, list[torch.nn.Module]]:
    """AutoBridge's bridge of a folder, and the model that it makes, with the folder's weights."""
    step35_patch.activate(gate_layout=gate_layout)
    start()
    bridge = AutoBridge.from_hf_pretrained(folder)
    assert isinstance(bridge._model_bridge, Step35Bridge)
    provider = bridge.to_megatron_provider()
    assert isinstance(provider, Step35BridgeProvider)
    for name, value in fields.items():
        setattr(provider, name, value)
    provider.pipeline_dtype = torch.float32
    provider.finalize()
    provider.initialize_model_parallel(seed=1)
    options = {"wrap_with_ddp": False, "use_cpu_initialization": True}
    return bridge, provider.provide_distributed_model(**options)


def convert(folder: str, out: str, gate_layout: str, fields: str) -> None:
    """Load, halve, export and save a folder; in one process, its logits besides.

    A half is exact. It shows that what is exported is what the model has.
    """
    bridge, chunks = provided(Path(folder), gate_layout, json.loads(fields))
    Path(out).mkdir(exist_ok=True)
    if int(os.environ["WORLD_SIZE"]) == 1:
        tokens = torch.load(Path(folder, "tokens.pt"))
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.no_grad():
            torch.save(chunks[0].eval()(tokens, positions, None), Path(out, "logits.pt"))
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.mul_(0.5)
    exported = dict(bridge.export_hf_weights(chunks, show_progress=False))
    bridge.save_hf_pretrained(chunks, out, show_progress=False)
    if torch.distributed.get_rank() == 0:
        saved = load_file(Path(out, "model.safetensors"))
        assert saved.keys() == exported.keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in exported.items())


def train(folder: str, checkpoint: str, options: str) -> None:
    """Megatron-Bridge's own loop on mock data; a checkpoint each second iteration.

    It goes on from the checkpoint, if there is one. Options: `iterations`, how many this process
    does; `optimizer`; `gate_layout`; `fields` of the provider, and `fields_of_rank_1` alone;
    `pretrained`, a checkpoint whose weights are fine-tuned instead; `adapters`, of which class on
    which of the linear layers.
    """
    bridge_on_cpu.install_training()
    from megatron.bridge.peft.dora import DoRA
    from megatron.bridge.peft.lora import LoRA
    from megatron.bridge.training import config
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.tokenizers.config import TokenizerConfig

    asked = json.loads(options)
    step35_patch.activate(gate_layout=asked.get("gate_layout"))
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    provider.use_cpu_initialization, provider.pipeline_dtype = True, torch.float32
    provider.seq_length = LENGTH
    fields = asked.get("fields", {})
    if os.environ["RANK"] == "1":
        fields |= asked.get("fields_of_rank_1", {})
    for name, value in fields.items():
        setattr(provider, name, value)
    peft = None
    if "adapters" in asked:
        kind, layers = asked["adapters"]
        classes = {"LoRA": LoRA, "DoRA": DoRA, "Step35CanonicalLoRA": Step35CanonicalLoRA}
        peft = classes[kind](target_modules=layers, dim=4, alpha=8)
    weight_decay = {"start_weight_decay": 0.1, "end_weight_decay": 0.1}
    (finetune if "pretrained" in asked else pretrain)(
        config.ConfigContainer(
            model=provider,
            train=config.TrainingConfig(
                train_iters=4,
                exit_interval=asked.get("iterations", 4),
                global_batch_size=2,
                micro_batch_size=2,
            ),
            validation=config.ValidationConfig(eval_interval=None, eval_iters=0),
            optimizer=config.OptimizerConfig(
                optimizer=asked.get("optimizer", "adam"),
                lr=1e-2,
                min_lr=1e-2,
                use_distributed_optimizer=False,
                params_dtype=torch.float32,
            ),
            scheduler=config.SchedulerConfig(
                lr_decay_style="constant",
                lr_decay_iters=4,
                lr_warmup_iters=0,
                weight_decay_incr_style="constant",
                **weight_decay,
            ),
            ddp=config.DistributedDataParallelConfig(use_distributed_optimizer=False),
            dataset=config.MockGPTDatasetConfig(
                random_seed=1,
                reset_attention_mask=False,
                reset_position_ids=False,
                eod_mask_loss=False,
                seq_length=LENGTH,
                dataloader_type="single",
                num_workers=0,
            ),
            logger=config.LoggerConfig(log_interval=1),
            tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=96),
            checkpoint=config.CheckpointConfig(
                save=checkpoint,
                load=checkpoint,
                pretrained_checkpoint=asked.get("pretrained"),
                save_interval=2,
                ckpt_format="torch_dist",
            ),
            rng=config.RNGConfig(seed=3),
            dist=config.DistributedInitConfig(distributed_backend="gloo"),
            peft=peft,
        ),
        forward_step,
    )


def export(folder: str, checkpoint: str, out: str) -> None:
    """The published layout of a checkpoint that Megatron-Bridge's loop saved."""
    AutoBridge.from_hf_pretrained(folder).export_ckpt(checkpoint, out, show_progress=False)
