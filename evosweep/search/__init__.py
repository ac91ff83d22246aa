"""The algorithms, pure: numpy in, numpy out; no optuna, no torch."""
