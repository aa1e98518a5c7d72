"""From a checkpoint and a policy to a bundle: tracing, graph passes, weights, parity."""
