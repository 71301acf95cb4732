"""What stands around Megatron-Core's functions, and how it gets there and away again."""
