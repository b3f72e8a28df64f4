"""Data loading: datasets, decoding, transforms, sample order and batches."""
