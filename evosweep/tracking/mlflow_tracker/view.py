"""The table and charts that MLflow's UI shows of an experiment: searches, best first, and their comparison."""

import json
from collections.abc import Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from evosweep.core.metrics import KL, PPL, SECONDS, SIZE_MB, TOKENS
from evosweep.tracking.mlflow_tracker.store import is_server, without_user
from evosweep.tracking.naming import PARAMS

UI = "http://127.0.0.1:5000"  # mlflow ui's default address
VIEW = "evosweep"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"  # a view of the runs' table that a link can name
KIND_TAG = "mlflow.experimentKind"  # which pages the UI opens with; its own guess is evaluation of agents
NOTE_TAG = "mlflow.note.content"  # what the UI shows as description
PARENT_TAG = "mlflow.parentRunId"
ALWAYS = (KL, PPL)
ALSO = (SIZE_MB, TOKENS, SECONDS)
FIRST_PARAMS = ("sampler", "budget")
MOST_RUNS = 500  # of the newest runs, whose values decide which columns are shown
MOST_AXES = 5  # params of the parallel coordinates
DESCRIPTION = """\
Searches by **evosweep**: which layer of a language model is compressed how hard, within a size. One run a search; a
multirun has a parent run that carries its best figures and the comparison.

- `kl`, `ppl`: of the winner, on validation text that neither the levels nor the search saw. Validation never selects:
  the winner is the allocation with the best score on search tokens.
- `size_mb`: the whole model at its true size, 10^6 bytes. `tokens`: scored by the search. `seconds`: of the search.
- `val/..`: validation figures of each generation's elite. `stages/..`: how far the best candidate of a stage was ahead
  on the same tokens: of its parent in the last stage, of the median candidate before.
- The image slider of a run (its Model metrics page) plays the level of every layer, generation by generation.
"""


def experiment_tags(runs: Sequence[Run] = ()) -> dict[str, str]:
    """Return the tags that make the UI open an experiment well: kind of work, description, table and charts."""
    return {
        KIND_TAG: "custom_model_development",
        NOTE_TAG: DESCRIPTION,
        VIEW_TAG: json.dumps(view_state(runs)),
    }


def view_state(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the state of the runs page: only columns in which runs differ, best validation KL first.

    Args:
        runs: Of the experiment; a multirun's parent among them does not decide about columns.
    """
    params = varied_params(runs)
    shown = list(ALWAYS) + [key for key in ALSO if _differs([run.data.metrics.get(key) for run in _jobs(runs)])]
    columns = [f"metrics.`{key}`" for key in shown] + [f"params.`{key}`" for key in params]
    charts, sections = _charts(params)
    return {
        "selectedColumns": columns,
        "orderByKey": f"metrics.`{KL}`",
        "orderByAsc": True,
        "searchFilter": "",
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "isAccordionReordered": True,  # else the UI sorts the sections by name
    }


def varied_params(runs: Sequence[Run]) -> list[str]:
    """Return the params in which runs differ, those of a multirun's own choice first."""
    jobs = _jobs(runs)
    if len(jobs) < 2:
        return list(FIRST_PARAMS)
    keys = list(dict.fromkeys(key for run in jobs for key in run.data.params))
    varied = [key for key in keys if _differs([run.data.params.get(key) for run in jobs])]
    return sorted(varied, key=lambda key: (key in PARAMS and key != "sampler", keys.index(key)))


def refresh(client: MlflowClient, experiment: str) -> None:
    """Fit the experiment's view to the runs that it has now."""
    runs = client.search_runs([experiment], max_results=MOST_RUNS)
    client.set_experiment_tag(experiment, VIEW_TAG, json.dumps(view_state(runs)))


def link(uri: str, experiment: str) -> str:
    """Return the address of the table: on the server, or where ``mlflow ui`` listens."""
    base = without_user(uri) if is_server(uri) else UI
    return f"{base}/#/experiments/{experiment}/runs?viewStateShareKey={VIEW}&workflowType=machine_learning"


def _jobs(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.data.params.get("sampler") or (KL in run.data.metrics and not _is_parent(run))]


def _is_parent(run: Run) -> bool:
    return "evosweep.multirun" in run.data.tags


def _differs(values: Sequence[object]) -> bool:
    return len(set(values)) > 1 or len(values) < 2


def _charts(params: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return charts and their sections: results, results over varied params, and figures over generations."""
    common = {"runsCountToCompare": 30, "deleted": False, "isGenerated": False}
    charts: list[dict[str, Any]] = [
        {"uuid": "kl", "type": "BAR", "metricKey": KL, "metricSectionId": "results", "displayName": KL},
        {"uuid": "ppl", "type": "BAR", "metricKey": PPL, "metricSectionId": "results", "displayName": PPL},
        {
            "uuid": "size",
            "type": "SCATTER",
            "metricSectionId": "results",
            "displayName": "size against quality",
            "xaxis": {"key": SIZE_MB, "type": "METRIC"},
            "yaxis": {"key": KL, "type": "METRIC"},
        },
        {
            "uuid": "varied",
            "type": "PARALLEL",
            "metricSectionId": "results",
            "displayName": "what was varied",
            "selectedParams": list(params[:MOST_AXES]),
            "selectedMetrics": [KL],
            "showAllRuns": False,
        },
    ]
    sections = [{"uuid": "results", "name": "results", "display": True, "isReordered": True, "deleted": False}]
    return [{**common, **chart} for chart in charts], sections
