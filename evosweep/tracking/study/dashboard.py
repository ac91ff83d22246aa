"""The note and the interactive figures that Optuna Dashboard shows of a study."""

from contextlib import suppress

import optuna

from evosweep.core.events import SearchResult
from evosweep.tracking.describe import describe


def add_to_dashboard(study: optuna.Study, result: SearchResult) -> None:
    """Save a note and figures into a study; does nothing without the ``dashboard`` extra."""
    with suppress(ImportError):
        from optuna_dashboard import save_note, save_plotly_graph_object  # noqa: PLC0415 - an extra

        from evosweep.tracking.artifacts import interactive  # noqa: PLC0415 - needs plotly, of the same extra

        save_note(study, describe(result))
        for name, draw in interactive.FIGURES.items():
            save_plotly_graph_object(study, draw(result), graph_object_id=name)
