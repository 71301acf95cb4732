"""What a model costs: operations, parameters and bytes, counted from its config."""
