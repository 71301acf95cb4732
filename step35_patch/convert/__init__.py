"""The published checkpoint to Megatron's torch_dist format and back, in little memory."""

from step35_patch.convert.job import ConversionError, Options
from step35_patch.convert.to_megatron import convert_to_hf, convert_to_megatron

__all__ = ["ConversionError", "Options", "convert_to_hf", "convert_to_megatron"]
