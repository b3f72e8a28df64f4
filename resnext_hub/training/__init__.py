"""Training: configuration, optimizer, checkpoints, evaluation, and the loop that uses them."""
