"""How an amax is found: what gathers it from the tensors that pass, and the range of a weight."""
