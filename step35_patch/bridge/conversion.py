"""Step35Bridge: Megatron-Bridge's conversion of a Step-3.5 model."""

from __future__ import annotations

import os
from typing import Any

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.utils import unwrap_model
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from step35_patch import settings as process
from step35_patch.bridge.mappings import mappings_of
from step35_patch.bridge.peft import AdapterBridge
from step35_patch.bridge.provider import Step35BridgeProvider
from step35_patch.config.model import Step35Config
from step35_patch.model.description import Step35Runtime
from step35_patch.tensors.table import tensor_table

# The published architecture, and that of a Step-3.7 model's text part alone.
ARCHITECTURES = ("Step3p5ForCausalLM", "Step3p7ForCausalLM")


class Step35Bridge(AdapterBridge):
    """Between the published layout of Step-3.5 and this package's GPTModel.

    The gate layout, the window and the padded logits are those that the process was asked for
    (`step35_patch.activate`), and may be changed on the provider.
    """

    # Copied over the config that Megatron-Bridge saves, which is as the class has it that read it.
    ADDITIONAL_FILE_PATTERNS = (CONFIG_NAME,)

    def provider_bridge(self, hf_pretrained: Any) -> Step35BridgeProvider:
        """The provider of a Hugging Face model, or of a config without weights.

        Raises:
            Step35ConfigError: its config is not a legal Step-3.5 config.
        """
        request = process.request()
        return Step35BridgeProvider.of(
            published_config(hf_pretrained),
            gate_layout=request.gate_layout,
            window=request.window,
            padded_logits=request.padded_logits,
        )

    def mapping_registry(self) -> MegatronMappingRegistry:
        """How each parameter is made of published tensors; see `mappings_of`."""
        if self._runtime is not None:
            config, gate_layout = self._runtime.config, self._runtime.gate_layout
        else:
            source = getattr(self, "hf_pretrained", None) or self.hf_config
            config, gate_layout = published_config(source), process.request().gate_layout
        return MegatronMappingRegistry(*mappings_of(config, gate_layout))

    def build_conversion_tasks(
        self, hf_pretrained: Any, megatron_model: list[Any], **options: Any
    ) -> list[Any]:
        """Megatron-Bridge's tasks, for the gate layout that the model has.

        Raises:
            ValueError: the model is not a Step-3.5 model; or the folder lacks published tensors,
                whose parameters Megatron-Bridge would leave as they are with a warning.
        """
        runtime = self.know(megatron_model)
        config = unwrap_model(megatron_model)[0].config
        _check_complete(hf_pretrained, runtime, config.mtp_num_layers or 0)
        tasks: list[Any] = super().build_conversion_tasks(hf_pretrained, megatron_model, **options)
        return tasks

    @classmethod
    def megatron_to_hf_config(cls, provider: Step35BridgeProvider) -> dict[str, Any]:
        """The published config of a provider, for a folder that has none to copy."""
        return provider.step35.config.to_dict() | {"architectures": [ARCHITECTURES[0]]}


def published_config(source: Any) -> Step35Config:
    """The config of what Megatron-Bridge calls `hf_pretrained`.

    From the file itself: the classes that it was read by (Megatron-Bridge's or those of the
    checkpoint's own code) take lists apart and fill in what it doesn't say.

    Args:
        source: a wrapper of a pretrained model, or a transformers config that knows its folder.

    Raises:
        ValueError: a config does not say which folder it was read from.
        Step35ConfigError: it is not a legal Step-3.5 config.
    """
    hf_config = getattr(source, "config", source)
    path = getattr(source, "model_name_or_path", None) or getattr(hf_config, "_name_or_path", None)
    file = _config_file(str(path)) if path else None
    if file is None:
        raise ValueError(
            f"hf_config: expected one that knows the model's folder, found {path or 'no folder'} "
            f"without a {CONFIG_NAME}; read it with AutoConfig.from_pretrained(folder)"
        )
    return Step35Config.from_pretrained(file)


def _config_file(path: str) -> str | None:
    if os.path.isdir(path):
        file = os.path.join(path, CONFIG_NAME)
        return file if os.path.exists(file) else None
    found: str | None = cached_file(path, CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
    return found


def _check_complete(hf_pretrained: Any, runtime: Step35Runtime, mtp_layers: int) -> None:
    source = getattr(getattr(hf_pretrained, "state", None), "source", None)
    if source is None:  # a config alone
        return
    rows = tensor_table(runtime.config, runtime.gate_layout, mtp_layers=mtp_layers)
    missing = sorted(
        {tensor.name for row in rows for tensor in row.published} - {*source.get_all_keys()}
    )
    if missing:
        raise ValueError(
            "published tensors that the folder lacks, so that their parameters would be left as "
            "they are:\n  "
            + "\n  ".join(missing)
            + "\nTake a whole checkpoint; without its MTP layers set mtp_num_layers to None on the "
            "provider."
        )


for architecture in ARCHITECTURES:
    MegatronModelBridge.register_bridge(
        source=architecture,
        target=GPTModel,
        provider=Step35BridgeProvider,
        model_type="step3p5",
    )(Step35Bridge)
