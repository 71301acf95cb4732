"""The description of a Step-3.5 model, which Megatron-Core's TransformerConfig has no room for.

A `Step35Runtime` is that description: the validated Hugging Face config together with the
choices that the config does not make (gate layout, window convention and what becomes of padded
columns). `runtime_for` answers the one question that every hook asks: is this TransformerConfig a
Step-3.5 model's, and which one's?
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, Self

from step35_patch import settings as process
from step35_patch.config.layer_plan import LayerPlan
from step35_patch.config.model import Step35Config, Window
from step35_patch.model.megatron_fields import model_fields
from step35_patch.settings import GateLayout, PaddedLogits, Settings

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

# They decide whether a TransformerConfig is meant to be this model at all; everything else must
# then agree.
IDENTITY_FIELDS = ("num_layers", "hidden_size")


@dataclass(frozen=True)
class Step35Runtime:
    """What a Step-3.5 model is: its config and the choices that go with it. Immutable and shared.

    Args:
        config: the validated Hugging Face config.
        gate_layout: "headwise" or "expanded" (see `step35_patch.model.attention`).
        window: "hf" (a sliding layer's query sees W keys) or "steptron" (W + 1 keys).
        padded_logits: "masked" or "kept" (see `step35_patch.model.padded_vocabulary`).
        source: where the config came from, for messages.
    """

    config: Step35Config
    gate_layout: GateLayout = "headwise"
    window: Window = "hf"
    padded_logits: PaddedLogits = "masked"
    source: str = field(default="<object>", compare=False)
    layers: tuple[LayerPlan, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, found, legal in (
            ("gate_layout", self.gate_layout, process.GATE_LAYOUTS),
            ("padded_logits", self.padded_logits, process.PADDED_LOGITS),
        ):
            if found not in legal:
                raise ValueError(
                    f"{name}: expected {' or '.join(map(repr, legal))}, found {found!r}"
                )
        if self.config.moe_layers_enum and self.config.moe_top_k == 1:
            raise ValueError(
                "moe_top_k: expected at least 2, found 1: Megatron-Core does not normalise the "
                "weight of a single expert, as norm_expert_weight asks for"
            )
        object.__setattr__(self, "layers", self.config.resolve(self.window))

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        # Megatron-Core deep-copies TransformerConfigs for each expert layer; this is immutable.
        return self

    def layer(self, index: int, *, is_mtp: bool) -> LayerPlan:
        """The plan of the 0-based absolute layer `index`.

        Raises:
            IndexError: there is no such layer, or it is one of the other kind.
        """
        first, last = (
            (self.config.num_hidden_layers, len(self.layers) - 1)
            if is_mtp
            else (0, self.config.num_hidden_layers - 1)
        )
        if not first <= index <= last:
            kind = "MTP" if is_mtp else "decoder"
            raise IndexError(
                f"layer index {index}: expected {first} to {last} for a {kind} layer of a config "
                f"with num_hidden_layers={self.config.num_hidden_layers} and "
                f"num_nextn_predict_layers={self.config.num_nextn_predict_layers}; "
                "check --num-layers, --mtp-num-layers and the pipeline layout"
            )
        return self.layers[index]


class LayerConfig(Protocol):
    """What a layer's own TransformerConfig says of the layer (`step35_patch.model.layer`).

    It is a TransformerConfig with two more attributes; named here is what varies by layer.

    Attributes:
        step35: The model. The TransformerConfig of a whole model may have it too.
        step35_layer: The layer's plan. The next fields, Megatron-Core's, are set from it.
        num_attention_heads: Over all tensor-parallel ranks, as are the groups.
        num_query_groups: Heads of keys and values.
        kv_channels: Dimensions of a head.
        window_size: (left, right), or None for full attention.
        attention_output_gate: Whether there is a gate, of whichever layout.
        use_te_activation_func: Whether the MLPs leave the activation to a module (`swiglu`).
    """

    step35: Step35Runtime
    step35_layer: LayerPlan
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    window_size: tuple[int, int] | None
    cp_comm_type: str | list[str] | None
    attention_output_gate: bool
    use_te_activation_func: bool


def conflicts(config: TransformerConfig, step35: Step35Config) -> list[str]:
    """Every field of a TransformerConfig that contradicts the Step-3.5 config, a line each."""
    lines = []
    for name, expected in model_fields(step35).items():
        found = getattr(config, name)
        if name == "moe_layer_freq" and isinstance(found, int):
            found = [int(i % found == 0) for i in range(config.num_layers)]
        if name == "mtp_num_layers" and (found or 0) <= (expected or 0):
            continue  # fewer are built, and the others left alone
        if found != expected:
            lines.append(
                f"{name}: the config needs {expected!r}, the TransformerConfig has {found!r}"
            )
    return lines


def check(config: TransformerConfig, step35: Step35Config, source: str) -> None:
    """Raise ValueError with all conflicts at once if `config` cannot be the model of `step35`."""
    if lines := conflicts(config, step35):
        raise ValueError(
            f"the TransformerConfig contradicts the Step-3.5 config ({source}):\n  "
            + "\n  ".join(lines)
            + "\nChange the arguments, or the config that is given to step35_patch."
        )


def runtime_for(config: TransformerConfig) -> Step35Runtime | None:
    """The Step-3.5 model that a TransformerConfig describes, or None for any other model.

    A config made by `Step35ModelProvider`, or from Megatron's arguments, says so itself. Any
    other one is this model if a config was activated and it has that config's number of layers
    and hidden size.

    Raises:
        ValueError: layers and hidden size are those of the active config but other fields
            contradict it; all of them are listed.
    """
    runtime: Step35Runtime | None = getattr(config, "step35", None)
    if runtime is not None:
        return runtime
    settings = process.active()
    if settings is None:
        return None
    wanted = model_fields(settings.config)
    if any(getattr(config, name) != wanted[name] for name in IDENTITY_FIELDS):
        return None
    check(config, settings.config, settings.source)
    return from_settings(settings)


@lru_cache(maxsize=4)  # asked for at every step, by Megatron's count of operations
def from_settings(settings: Settings) -> Step35Runtime:
    """The model that the process-wide activation asks for."""
    return Step35Runtime(**settings._asdict())
