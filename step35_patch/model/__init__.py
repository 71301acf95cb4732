"""What is built: Megatron-Core's layer with its own layer's numbers, and the model around it."""
