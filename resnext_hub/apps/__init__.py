"""Pages on which a trained model can be tried: one from this machine, one that runs in the browser."""
