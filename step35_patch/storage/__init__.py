"""Files of weights, read and written: safetensors folders, Megatron's torch_dist checkpoints."""
