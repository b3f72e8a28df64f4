"""Benchmarks: throughput against baselines that do the same work on the same machine, each with its error."""
