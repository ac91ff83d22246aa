"""What happens to events: MLflow, console, nothing."""
