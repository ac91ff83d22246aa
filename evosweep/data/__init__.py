"""Documents from files and datasets, their division into splits, and token windows."""
