"""How fast this is beside its peers: the same work by turns, on the machine at hand, each with its error."""
