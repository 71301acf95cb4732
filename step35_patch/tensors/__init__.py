"""Which tensors a model has, under their published names and under Megatron's keys."""
