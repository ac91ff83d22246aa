"""Listeners of a search: MLflow, Optuna study, console; and the files of its report."""
