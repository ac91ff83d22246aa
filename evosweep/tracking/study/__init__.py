"""The Optuna study of a search: where it is kept, what is recorded, what the dashboard shows."""
