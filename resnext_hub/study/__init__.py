"""Compare cardinality, width and depth at equal cost, as the paper does, on any dataset."""
