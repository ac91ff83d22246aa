"""Score a whole population of allocations at once."""
