"""Faster implementations of a model's layers, over the same parameters."""
