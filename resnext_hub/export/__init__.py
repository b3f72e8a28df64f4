"""Trained models as files for other libraries and runtimes."""
