"""MLflow: one run a search, one metric step a generation."""

from evosweep.tracking.mlflow_tracker.tracker import MlflowTracker

__all__ = ["MlflowTracker"]
