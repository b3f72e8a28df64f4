"""From a source of pictures to batches: datasets, transforms, and the order of the samples."""
