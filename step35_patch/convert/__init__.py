"""The published checkpoint to Megatron's torch_dist format and back, in little memory.

Both directions copy runs of rows (`tensors.megatron`) from files into new ones, a few files at a
time (`job`). Nothing needs a GPU or a process group. The output is staged (`storage.staging`): it
appears whole or not at all, and a run that was killed is resumed.
"""

from step35_patch.convert.conversion import ConversionError, Options
from step35_patch.convert.to_hf import convert_to_hf
from step35_patch.convert.to_megatron import convert_to_megatron

__all__ = ["ConversionError", "Options", "convert_to_hf", "convert_to_megatron"]
