"""What is done with a trained network: predictions, and files for other runtimes."""
