"""What is built: Megatron-Core's layer with the numbers of its own layer, and the model around it."""
