"""What the tests share: models and weights, the reference, runs under torchrun, environments."""
