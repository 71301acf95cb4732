"""Step35ModelProvider: a Step-3.5 model without pretrain_gpt.py and its arguments."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, Self

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from step35_patch.config.model import Step35Config, Window
from step35_patch.model.communication import cp_comm_type_problems
from step35_patch.model.description import Step35Runtime, check, runtime_for
from step35_patch.model.gpt import build_gpt_model
from step35_patch.model.layer import check_options
from step35_patch.model.megatron_fields import (
    FIELDS,
    FIXED_VALUES,
    hf_fields,
    model_fields,
    provider_fields,
)
from step35_patch.model.mtp import embedding_ranks
from step35_patch.settings import GateLayout, PaddedLogits


@dataclass
class Step35ModelProvider(TransformerConfig):
    """A TransformerConfig of Step-3.5 that builds its GPTModel.

    Usually made by `from_hf`. Made by hand, it takes TransformerConfig's fields and the following
    ones, and validates them as a Hugging Face config is validated. Lists are by layer: num_layers
    entries, or those and the MTP layers'.

    Args:
        mtp_num_layers: how many of the config's MTP layers are built, the first ones; None or 0 to
            build none.
        layer_types: "full_attention" or "sliding_attention" for each layer.
        attention_other_setting: the sliding layers' heads, as in the Hugging Face config.
        sliding_attention_setting: {"sliding_window": W}, in keys, the query's own included.
        rotary_base_per_layer: RoPE base for each layer, or one for all.
        partial_rotary_factors: rotated share of a head for each layer; None means 1.0.
        rope_scaling, yarn_only_types: llama3 scaling and the layer types that it applies to.
        swiglu_limits, swiglu_limits_shared: clamps for each layer; 0 or None means no clamp.
        head_wise_attn_gate: whether each head's output is gated.
        vocab_size, max_position_embeddings: as in the Hugging Face config.
        gate_layout, window, padded_logits: see `step35_patch.activate`.
        parallel_output: leave the logits split by vocabulary over the tensor-parallel ranks.

    Fields may be set later on, as frameworks do. Whatever builds something from the provider then
    finds what the constructor would have made of the same values, or its errors.

    Raises:
        Step35ConfigError: fields contradict each other; all problems are listed.
        ValueError: fields contradict the config that `from_hf` read.
    """

    # Megatron-Core's defaults are other ones (`megatron_fields.FIELDS`, the rows with is_default).
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    moe_router_load_balancing_type: str | list[str] = "none"
    moe_router_bias_update_rate: float = 0.0

    mtp_num_layers: int | None = None
    layer_types: list[str] | None = None
    attention_other_setting: dict[str, Any] | None = None
    sliding_attention_setting: dict[str, Any] | None = None
    rotary_base_per_layer: list[float] | float | None = None
    partial_rotary_factors: list[float] | None = None
    rope_scaling: dict[str, Any] | None = None
    yarn_only_types: list[str] | None = None
    swiglu_limits: list[float | None] | None = None
    swiglu_limits_shared: list[float | None] | None = None
    head_wise_attn_gate: bool = True
    vocab_size: int = 0
    max_position_embeddings: int = 0
    gate_layout: GateLayout = "headwise"
    window: Window = "hf"
    padded_logits: PaddedLogits = "masked"
    parallel_output: bool = True
    hf_config: Step35Config | None = None

    @classmethod
    def from_hf(cls, path: str | PathLike[str], **overrides: Any) -> Self:
        """The provider of a Hugging Face config.

        Args:
            path: a config.json, or a folder with one.
            overrides: TransformerConfig's fields (parallel sizes, precision, recompute, ...),
                `gate_layout`, `window`, `padded_logits` and `parallel_output`. One that
                contradicts the config is an error.

        Raises:
            Step35ConfigError: the file is not a legal Step-3.5 config.
        """
        return cls.of(Step35Config.from_pretrained(path), **overrides)

    @classmethod
    def of(cls, config: Step35Config, **overrides: Any) -> Self:
        """The provider of a config that is read already; overrides are as for `from_hf`."""
        return cls(
            hf_config=config,
            **{
                "transformer_impl": "transformer_engine" if HAVE_TE else "local",
                **model_fields(config),
                **provider_fields(config),
                **overrides,
            },
        )

    def __post_init__(self) -> None:
        self._asked = self._values()
        if self.hf_config is None:
            self.hf_config = self._described_config()
            self._take_model_fields(self.hf_config)
        self.hetereogenous_dist_checkpoint = True
        if self.mtp_num_layers == 0:
            self.mtp_num_layers = None  # Megatron-Core's for no MTP layers
        super().__post_init__()
        self._check_provider_fields(self.hf_config)
        check(self, self.hf_config, "hf_config")
        runtime = Step35Runtime(self.hf_config, self.gate_layout, self.window, self.padded_logits)
        check_options(self, runtime)
        self._runtime = runtime
        self._made = self._values()
        self._set: frozenset[str] = frozenset()

    @property
    def step35(self) -> Step35Runtime:
        """The model, as the fields describe it now: `runtime_for` reads it.

        Raises:
            Step35ConfigError, ValueError: as the constructor, of fields that were set later on.
        """
        if not self._is_layers_own and (changed := self._changed()):
            made = type(self)(**self._asked | changed)
            self.__dict__.update(vars(made))
            self._set = frozenset()
        return self._runtime

    @step35.setter
    def step35(self, runtime: Step35Runtime) -> None:
        """For a copy that describes one layer, whose fields are no whole model's any more."""
        self._runtime, self._is_layers_own = runtime, True

    _is_layers_own = False

    def _values(self) -> dict[str, Any]:
        """The constructor's arguments, as they are now: lists in them may be changed later on."""
        return {
            known.name: copy.copy(value) if isinstance(value, list | dict) else value
            for known in fields(self)
            if known.init
            for value in [getattr(self, known.name)]
        }

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if "_made" in vars(self) and name in self._made:
            self.__dict__["_set"] = self._set | {name}  # copies of the provider share it

    def _changed(self) -> dict[str, Any]:
        """The fields that were set after the constructor, with their values.

        To what they are already, too: what the constructor made of another field would change with
        that one (expert_tensor_parallel_size with tensor_model_parallel_size).
        """
        made = self._made
        return {
            name: value
            for name, value in self._values().items()
            if name in self._set or (value is not made[name] and value != made[name])
        }

    def _take_model_fields(self, config: Step35Config) -> None:
        """Set what the config decides; what was asked for otherwise is an error."""
        defaults = type(self).__dataclass_fields__
        lines = [
            f"{name}: expected {value!r}, found {found!r}"
            for name, value in FIXED_VALUES.items()
            if (found := self._asked[name]) not in (value, defaults[name].default)
        ]
        for name, value in model_fields(config).items():
            setattr(self, name, value)
        if lines:
            raise ValueError(
                "fields that a Step-3.5 model has one value of:\n  " + "\n  ".join(lines)
            )

    def _described_config(self) -> Step35Config:
        """The Hugging Face config that the fields describe."""
        document = hf_fields(self) | {
            "model_type": "step3p5",
            "torch_dtype": str(self.params_dtype).removeprefix("torch."),
        }
        return Step35Config.from_dict(
            {name: value for name, value in document.items() if value is not None}
        )

    def _check_provider_fields(self, config: Step35Config) -> None:
        document, found = config.to_dict(), hf_fields(self)
        lines = [
            f"{row.megatron}: the config has {document.get(row.hf)!r}, found "
            f"{getattr(self, row.megatron)!r}"
            for row in FIELDS
            if row.of_provider
            and row.hf is not None
            and row.megatron is not None
            and found[row.hf]
            != document.get(row.hf, type(self).__dataclass_fields__[row.megatron].default)
        ]
        if lines:
            raise ValueError("fields that contradict hf_config:\n  " + "\n  ".join(lines))

    def provide(
        self,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """Build this process's part of the model with Megatron-Core's initialised groups.

        Args:
            pre_process: with the embedding (first pipeline stage).
            post_process: with the output layer (last pipeline stage).
            vp_stage: the model chunk under virtual pipeline parallelism.

        Returns:
            GPTModel with Step35DecoderLayer as its layers. Called with (input_ids [b, s],
            position_ids [b, s], attention_mask or None) it returns logits [b, s, vocabulary],
            with the columns that pad it; with labels [b, s] too, the loss of each token [b, s].

        Raises:
            RuntimeError: step35_patch was deactivated.
            ValueError: `cp_comm_type` is what Transformer Engine can't compute a layer with.
        """
        runtime_for(self)  # brings fields up to date that were set since
        if self.transformer_impl == "transformer_engine" and self.context_parallel_size > 1:
            self._check_communication()
        return build_gpt_model(
            self,
            vocab_size=self._padded_vocab_size(),
            max_sequence_length=self.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            parallel_output=self.parallel_output,
        )

    def embedding_ranks(self, pp_ranks: list[int], *_: Any) -> list[int]:
        """What `initialize_model_parallel` takes as its `get_embedding_ranks`.

        It is needed where MTP layers are not on the last stage alone
        (`pipeline_model_parallel_layout`), and right everywhere.

        Args:
            pp_ranks: a pipeline's ranks, by stage. What further arguments Megatron-Core may pass
                is not needed.
        """
        return embedding_ranks(pp_ranks, self)

    def _check_communication(self) -> None:
        given = self.cp_comm_type or "p2p"  # which Megatron-Core hands on for None
        problems = cp_comm_type_problems(
            [given] if isinstance(given, str) else given,
            self.step35.config,
            self.tensor_model_parallel_size,
            self.context_parallel_size,
        )
        if problems:
            raise ValueError(
                "context parallelism on Transformer Engine:\n  " + "\n  ".join(map(str, problems))
            )

    def _padded_vocab_size(self) -> int:
        """vocab_size, rounded up to a multiple of the tensor-parallel size."""
        size: int = self.tensor_model_parallel_size
        return -(-self.vocab_size // size) * size
