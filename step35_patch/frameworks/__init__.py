"""What trainers on Megatron-Core call: what builds the model, and what sends its weights.

docs/frameworks.md says, for each trainer, what to write where.
"""

from step35_patch.frameworks.slime import slime_init, slime_provider
from step35_patch.frameworks.weights import WholeTensors, megatron_to_hf

__all__ = ["WholeTensors", "megatron_to_hf", "slime_init", "slime_provider"]
