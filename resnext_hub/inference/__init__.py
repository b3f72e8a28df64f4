"""Inference with trained models: classification and optimization."""
