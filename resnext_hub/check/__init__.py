"""Examine a dataset before training on it."""
