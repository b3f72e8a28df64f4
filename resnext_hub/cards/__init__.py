"""Model cards, rendered from records."""
