"""One-shot allocators: a problem in, level indices out; numpy and scipy only."""
