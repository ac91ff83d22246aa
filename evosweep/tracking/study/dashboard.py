"""The note and the interactive figures that Optuna Dashboard shows of a study."""

from contextlib import suppress

import optuna

from evosweep.core.events import SearchResult
from evosweep.tracking.describe import describe

EXPLAINED = (
    "How to read this study: every candidate is a pruned trial, with its stages' losses as intermediate values; those "
    "of two generations were taken on different text. The one complete trial is the exported winner, its value the "
    "validation KL, so History and Importance have nothing else to show. What the search did over time is in the two "
    "figures above Best Trial."
)


def add_to_dashboard(study: optuna.Study, result: SearchResult) -> None:
    """Save a note and figures into a study; does nothing without the ``dashboard`` extra."""
    with suppress(ImportError):
        from optuna_dashboard import save_note, save_plotly_graph_object  # noqa: PLC0415 - an extra

        from evosweep.tracking.artifacts import interactive  # noqa: PLC0415 - needs plotly, of the same extra

        save_note(study, f"{describe(result)}\n\n{EXPLAINED}")
        for name, draw in interactive.FIGURES.items():
            save_plotly_graph_object(study, draw(result), graph_object_id=name)
