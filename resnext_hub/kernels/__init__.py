"""The same functions, computed faster: other modules over the parameters of a model."""
