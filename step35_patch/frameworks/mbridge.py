"""Step-3.5 for mbridge (verl's `vanilla_mbridge`): importing this registers it.

For mbridge's main branch: its release 0.15.1 asks Megatron-Core for what 0.17 and later do not
have. What mbridge would do parameter by parameter, by tables of names for layers that are all
alike, is done by `step35_patch.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from mbridge.core import LLMBridge, register_model
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import AttnBackend

from step35_patch import settings as process
from step35_patch.checkpoint import load_hf_weights, published_tensors_of
from step35_patch.config.model import Step35Config
from step35_patch.model.provider import Step35ModelProvider


@register_model("step3p5")
class Step35MBridge(LLMBridge):
    """What `mbridge.AutoBridge` makes of a Step-3.5 config.

    Raises:
        ValueError: the config does not say which folder it was read from; or a multiple for the
            vocabulary is given, which is padded to one of the tensor-parallel size.
        Step35ConfigError: it is not a legal Step-3.5 config.
    """

    def __init__(self, hf_config: Any, *args: Any, **kwargs: Any):
        super().__init__(hf_config, *args, **kwargs)
        if self.make_vocab_size_divisible_by is not None:
            raise ValueError(
                "make_vocab_size_divisible_by: expected None, found "
                f"{self.make_vocab_size_divisible_by}; leave it out"
            )

    def _build_config(self) -> Step35ModelProvider:
        folder = self.hf_config.name_or_path
        if not folder:
            raise ValueError(
                "hf_config.name_or_path: expected the model's folder, found nothing; read the "
                "config with AutoConfig.from_pretrained(folder)"
            )
        asked = process.request()
        options = {
            "gate_layout": asked.gate_layout,
            "window": asked.window,
            "padded_logits": asked.padded_logits,
            "params_dtype": self.dtype,
            "pipeline_dtype": self.dtype,
            "bf16": self.dtype is torch.bfloat16,
            "fp16": self.dtype is torch.float16,
            "tensor_model_parallel_size": self.mpu.tp_size,
            "sequence_parallel": self.mpu.tp_size > 1,
            "pipeline_model_parallel_size": self.mpu.pp_size,
            "virtual_pipeline_model_parallel_size": self.mpu.vpp_size,
            "overlap_p2p_comm": self.mpu.vpp_size is not None and self.mpu.pp_size > 1,
            "batch_p2p_comm": False,
            "context_parallel_size": self.mpu.cp_size,
            "expert_model_parallel_size": self.mpu.ep_size,
            "expert_tensor_parallel_size": self.mpu.etp_size,
            "variable_seq_lengths": True,
            "moe_token_dispatcher_type": "alltoall",
        } | self.extra_args
        if isinstance(options.get("attention_backend"), str):
            options["attention_backend"] = AttnBackend[options["attention_backend"]]
        return Step35ModelProvider.of(Step35Config.from_pretrained(folder), **options)

    def _model_provider(
        self, post_model_creation_callbacks: Sequence[Callable[..., None]]
    ) -> Callable[..., GPTModel]:
        def provider(
            pre_process: bool, post_process: bool, vp_stage: int | None = None
        ) -> GPTModel:
            model = self.config.provide(pre_process, post_process, vp_stage)
            self.vocab_size, self.padded_vocab_size = self.config.vocab_size, model.vocab_size
            for callback in post_model_creation_callbacks:
                callback(
                    model,
                    pre_process=pre_process,
                    post_process=post_process,
                    config=self.config,
                    hf_config=self.hf_config,
                )
            return model

        return provider

    def load_weights(
        self, models: list[torch.nn.Module], weights_path: str, memory_efficient: bool = False
    ) -> None:
        """Fill the model chunks; see `step35_patch.checkpoint.load_hf_weights`."""
        self.safetensor_io = self._get_safetensor_io(weights_path)  # for save_weights
        load_hf_weights(models, self._get_actual_hf_path(weights_path))

    def export_weights(
        self, models: list[torch.nn.Module], keep_stacked_experts: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """All published tensors, on all ranks; see `published_tensors_of`.

        Args:
            models: this rank's model chunks.
            keep_stacked_experts: whatever it is, a layer's experts are in one tensor, as published.
        """
        for name, tensor in published_tensors_of(models, every_stage=True):
            yield name, tensor.contiguous()  # as mbridge's writer takes them
