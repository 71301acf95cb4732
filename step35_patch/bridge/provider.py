"""Step35BridgeProvider: Step35ModelProvider with what Megatron-Bridge asks of a provider."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from megatron.bridge.models.model_provider import ModelProviderMixin

from step35_patch.config.comparison import not_acceptable
from step35_patch.model.adapters import check_adapters
from step35_patch.model.provider import Step35ModelProvider


@dataclass
class Step35BridgeProvider(Step35ModelProvider, ModelProviderMixin):
    """The provider that `AutoBridge.to_megatron_provider` makes of a Step-3.5 model.

    Megatron-Bridge's recipes and loops set fields after it is made. They are checked, as the
    constructor checks its arguments, by `finalize` and whenever something is built.

    Args:
        seq_length: tokens of a sequence in training; what Megatron-Bridge's data sets are held
            against.
        make_vocab_size_divisible_by: not used; the vocabulary is padded to a multiple of the
            tensor-parallel size.
        should_pad_vocab: the same; Megatron-Bridge sets it.
        share_embeddings_and_output_weights: False, a Step-3.5 model's matrices are its own.
        accept_changed: names of the config's fields in which a checkpoint that is loaded may
            differ, as `--step35-accept-changed` of pretrain_gpt.py.

    All other fields are Step35ModelProvider's.
    """

    seq_length: int = 4096
    make_vocab_size_divisible_by: int = 1
    should_pad_vocab: bool = False
    share_embeddings_and_output_weights: bool = False
    accept_changed: list[str] = field(default_factory=list)

    def finalize(self) -> None:
        """Check and complete what was set since the provider was made.

        Raises:
            Step35ConfigError, ValueError: as the constructor.
        """
        _ = self.step35
        if problems := not_acceptable(self.accept_changed, "accept_changed"):
            raise ValueError("\n".join(map(str, problems)))
        if self.share_embeddings_and_output_weights:
            raise ValueError(
                "share_embeddings_and_output_weights: expected False, found True. The output "
                "matrix of a Step-3.5 model is not its embedding: leave it out."
            )

    def provide_distributed_model(self, *args: Any, **kwargs: Any) -> list[torch.nn.Module]:
        """As Megatron-Bridge's.

        Raises:
            ValueError: a hook has put adapters into the model that don't go with it.
        """
        chunks: list[torch.nn.Module] = super().provide_distributed_model(*args, **kwargs)
        check_adapters(chunks)
        return chunks

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Process groups, which Megatron-Bridge puts on its providers, are of this process.
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        for name, value in vars(self).items():
            made.__dict__[name] = value if name == "_pg_collection" else copy.deepcopy(value, memo)
        return made
