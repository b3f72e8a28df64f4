"""From a source of images to batches: datasets, transforms, and the order of the samples."""
