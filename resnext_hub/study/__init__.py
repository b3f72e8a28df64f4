"""Compare cardinality, width and depth at controlled cost, as the paper does, on any dataset."""
