"""The parent run of a multirun: figures of the best job, params that all jobs share, and their comparison."""

import time
from collections.abc import Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run

from evosweep.core.metrics import KL, PPL, SIZE_MB
from evosweep.core.redact import redact
from evosweep.tracking.mlflow_tracker import view
from evosweep.tracking.mlflow_tracker.writes import TAG_LENGTH

MULTIRUN_TAG = "evosweep.multirun"
MOST_JOBS = 1000
BEST = (KL, PPL, SIZE_MB)  # figures of the best job that the parent carries


def find_parent(client: MlflowClient, experiment: str, multirun: str) -> str | None:
    """Return the id of a multirun's parent run, None if there is none yet.

    Args:
        client: Of the store.
        experiment: Id of the experiment.
        multirun: Name of the multirun.
    """
    runs = client.search_runs([experiment], filter_string=f"tags.`{MULTIRUN_TAG}` = '{multirun}'", max_results=1)
    return str(runs[0].info.run_id) if runs else None


def summarize(
    client: MlflowClient,
    experiment: str,
    multirun: str,
    *,
    status: str,
    files: Sequence[Path],
    note: str,
    best: Sequence[str] = (),
) -> None:
    """End a multirun's parent run; nothing if no job began.

    Args:
        client: Of the store.
        experiment: Of the multirun.
        multirun: Its name.
        status: ``FINISHED``, ``FAILED`` or ``KILLED``.
        files: Comparison as tables and figures.
        note: Comparison in Markdown.
        best: Run ids or folders of the jobs that were named best, the best of them first.
    """
    parent = find_parent(client, experiment, multirun)
    if parent is None:
        return
    try:
        jobs = list(
            client.search_runs(
                [experiment], filter_string=f"tags.`{view.PARENT_TAG}` = '{parent}'", max_results=MOST_JOBS
            )
        )
        for path in files:
            client.log_artifact(parent, str(path))
        _describe(client, parent, jobs, note, best)
    finally:
        client.set_terminated(parent, status=status)
    view.refresh(client, experiment)


def _describe(client: MlflowClient, parent: str, jobs: Sequence[Run], note: str, best: Sequence[str]) -> None:
    """Give the parent the figures of its best job, the params that all jobs share, and a name that says both."""
    done = {job.info.run_id: job for job in jobs if KL in job.data.metrics}
    folders = {job.data.tags.get("folder"): run_id for run_id, job in done.items()}
    known_best = [folders.get(name, name) for name in best]
    named = [done[run_id] for run_id in known_best if run_id in done]
    if named:
        winner = named[0]
        figures = {key: float(winner.data.metrics[key]) for key in BEST if key in winner.data.metrics}
        now = int(time.time() * 1000)
        client.log_batch(parent, metrics=[Metric(key, value, now, 0) for key, value in figures.items()])
        name = f"best of {len(done)}: {winner.info.run_name}"
        client.update_run(parent, name=name)
        note = f"Best: **{winner.info.run_name}**, kl {figures[KL]:g}.\n\n{note}" if note else note
    params = [job.data.params for job in jobs]
    shared = {key: value for key, value in (params or [{}])[0].items() if all(one.get(key) == value for one in params)}
    known = client.get_run(parent).data.params
    added = {key: value for key, value in shared.items() if key not in known}
    if added:
        client.log_batch(parent, params=[Param(key, value) for key, value in added.items()])
    if note:
        client.set_tag(parent, view.NOTE_TAG, redact(note)[:TAG_LENGTH])
