"""transformers' Step-3.5 and this package's on the same tokens, layer by layer; start at `api`."""
