"""A training job from request to results."""
