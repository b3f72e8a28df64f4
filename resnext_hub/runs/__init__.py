"""A training run, from request to results."""
