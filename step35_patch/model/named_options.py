"""Options of Megatron-Core that let a Step-3.5 model compute something else, and may: one table.

They are choices of a training run. Each that is made is named in one line at start
(`step35_patch.patch.built_model.announce`), so that nothing differs from the published model
without a word. What would make it another model is refused instead
(`step35_patch.model.refused_options`). No torch is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class NamedOption:
    """An option with the values under which the published model is computed.

    Attributes:
        name: The field of TransformerConfig; one that a Megatron-Core lacks cannot be set.
        published: The published model's value; further ones mean the same.
        effect: What another value does, in a few words.
    """

    name: str
    published: tuple[object, ...]
    effect: str

    def is_published(self, found: object) -> bool:
        """Whether a value, or each of a list of them, is the published model's."""
        if isinstance(found, list):
            return all(entry in self.published for entry in found)
        return found in self.published


_RANDOM_EXPERTS = "experts are drawn at random, for benchmarks"
_DROPPED = "tokens above the capacity skip their expert"
_PRECISION = "matrices are multiplied in another precision"

NAMED_OPTIONS: tuple[NamedOption, ...] = (
    NamedOption("hidden_dropout", (0.0,), "dropout"),
    NamedOption("attention_dropout", (0.0,), "dropout"),
    NamedOption("moe_router_bias_update_rate", (0.0,), "each iteration moves router_bias by it"),
    # With a coefficient of 0 the type does nothing.
    NamedOption("moe_aux_loss_coeff", (0.0,), "adds a balancing loss to the gradients"),
    NamedOption("moe_z_loss_coeff", (None, 0.0), "adds a z loss to the gradients"),
    NamedOption("moe_input_jitter_eps", (None, 0.0), "the router's inputs are multiplied by noise"),
    NamedOption("moe_expert_capacity_factor", (None,), _DROPPED),
    NamedOption("moe_expert_rank_capacity_factor", (None,), _DROPPED),
    NamedOption("moe_router_force_load_balancing", (False,), _RANDOM_EXPERTS),
    NamedOption("moe_router_force_biased", (None,), _RANDOM_EXPERTS),
    NamedOption("moe_enable_routing_replay", (False,), "experts can be those of another run"),
    NamedOption(
        "cross_entropy_loss_fusion",
        (False,),
        "with --cross-entropy-fusion-impl native, the logits' gradients are rounded to bf16",
    ),
    NamedOption("fp16", (False,), "the published weights are bf16"),
    NamedOption("enable_autocast", (False,), _PRECISION),
    NamedOption("fp8", (None,), _PRECISION),
    NamedOption("fp4", (None,), _PRECISION),
    NamedOption("quant_recipe", (None,), _PRECISION),
    NamedOption("activation_func_fp8_input_store", (False,), "activations are stored in fp8"),
)


def differences(config: Any) -> list[str]:
    """What a TransformerConfig changes of the published model, an option each.

    Args:
        config: A TransformerConfig of a Step-3.5 model.

    Returns:
        Texts such as "hidden_dropout=0.1 (published: 0.0; dropout)".
    """
    return [
        f"{row.name}={found!r} (published: {row.published[0]!r}; {row.effect})"
        for row in NAMED_OPTIONS
        if not row.is_published(found := getattr(config, row.name, row.published[0]))
    ]
