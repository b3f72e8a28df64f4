"""Experiment trackers: each repeats what metrics.jsonl contains."""
