"""Every causal family of transformers, tried small: what fits, what is refused, and why."""
