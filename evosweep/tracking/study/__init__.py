"""The Optuna study of a search: storage, trials, and the dashboard's note and figures."""
