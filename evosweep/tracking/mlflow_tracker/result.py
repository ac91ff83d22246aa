"""Makes the writes of a search's end: its figures, its description and its files."""

import json

from evosweep.core.events import SearchResult
from evosweep.core.files import json_safe
from evosweep.tracking.describe import describe
from evosweep.tracking.mlflow_tracker import view, writes
from evosweep.tracking.mlflow_tracker.figures import domain_figures, result_figures, tail_figures, task_figures
from evosweep.tracking.mlflow_tracker.spool import Write


def result_writes(result: SearchResult) -> list[Write]:
    """Return the writes of a search that ended."""
    row = result.row()
    tags = {view.NOTE_TAG: describe(result), "dense_ppl": f"{result.dense['ppl']:.4f}"}
    tags |= {f"export.{key}": value for key, value in result.export.items()}
    files = {"allocation.json": {**row, "allocation": dict(result.allocation)}, "result.json": row}
    return [
        *writes.metrics(
            {
                **result_figures(row),
                **tail_figures(result.tails),
                **task_figures(result.tasks),
                **domain_figures(result.domains),
                **writes.finish_figures(result.finish),
            }
        ),
        writes.tags(tags),
        *(
            writes.text(json.dumps(json_safe(value), indent=1, ensure_ascii=False), name)
            for name, value in files.items()
        ),
    ]
