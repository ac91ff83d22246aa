"""One-shot allocators: they map a problem to level indices; numpy and scipy only."""
