"""Upload models and checkpoints to the Hugging Face Hub."""
