"""Training: configuration, optimizer, checkpoints, evaluation and the training loop."""
