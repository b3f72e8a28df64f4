"""Export trained models to files that other libraries and runtimes load."""
