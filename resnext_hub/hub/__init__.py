"""From a run to the Hugging Face Hub: the model folder, its card, and the upload."""
