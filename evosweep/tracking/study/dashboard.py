"""What Optuna Dashboard shows beside its own plots: a note, and our figures to hover over."""

from contextlib import suppress

import optuna

from evosweep.core.events import SearchResult
from evosweep.tracking.describe import describe


def dress(study: optuna.Study, result: SearchResult) -> None:
    """Save a note and figures into a study; without the ``dashboard`` extra nobody sees them, and nothing is saved."""
    with suppress(ImportError):
        from optuna_dashboard import save_note, save_plotly_graph_object  # noqa: PLC0415 - an extra

        from evosweep.tracking.artifacts import interactive  # noqa: PLC0415 - needs plotly, of the same extra

        save_note(study, describe(result))
        for name, draw in interactive.FIGURES.items():
            save_plotly_graph_object(study, draw(result), graph_object_id=name)
