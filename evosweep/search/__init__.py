"""Search algorithms in plain numpy, without Optuna or torch."""
