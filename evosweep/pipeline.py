"""The steps of a run in order, from checked objects to the exported winner.

load -> tokenize -> plan -> store -> problem -> measure -> search -> export -> report. No configuration and no printing
here: ``evosweep.cli`` builds the objects from YAML, ``evosweep.api`` from Python.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from evosweep.allocators.harm import EMQ
from evosweep.core.events import Listener, SearchResult
from evosweep.core.files import write_json
from evosweep.core.metrics import COVERAGE
from evosweep.core.problem import Problem
from evosweep.core.results import write_result
from evosweep.core.run_record import RunRecord, command_of
from evosweep.core.unit import with_columns
from evosweep.evaluate.memory import plan_memory
from evosweep.evaluate.mq_bench import check_bench
from evosweep.evaluate.sensitivity import MEASURES, measure
from evosweep.exporters.card import with_figures
from evosweep.finish.base import save_tuned
from evosweep.models.activations import is_static, no_ranges
from evosweep.models.patch import replaced_parameters
from evosweep.result_row import comparable_row, described, plain_row, with_front
from evosweep.samplers.base import PopulationSampler
from evosweep.search.loop import end_search, run_search
from evosweep.search.state import SearchState
from evosweep.shared_search import identity_of, scoring
from evosweep.task import Draft, Exporter, Notes, Task
from evosweep.task_checks import check_levels, check_limits, check_ranked
from evosweep.tracking.allocation_file import ALLOCATION, AllocationFile
from evosweep.tracking.base import TextInput, TrackingError
from evosweep.tracking.behind import Behind
from evosweep.tracking.naming import run_name
from evosweep.tracking.study.front import write_front
from evosweep.tracking.study.record import StudyRecorder
from evosweep.workbench import Workbench

logger = logging.getLogger(__name__)
SETTLE = 60.0  # seconds that writing may go on after a search
HURRY = 2.0  # after an interruption
CONFIG = "config.yaml"  # settings of a run; there once they are checked
STATE = "search_state.jsonl"  # what a search needs to go on
MEASURED = "measured.json"  # what was measured of every unit before the search
MODEL = "model"  # folder of the exported winner


def check(task: Task, bench: Workbench) -> Draft:
    """Check a task against its model and text before any work; return the run's name and the columns to measure."""
    for index, stage in enumerate(task.plan.stages):
        bench.splits["search"].count(f"search.stages[{index}].tokens", stage.tokens)
    if task.exporter.enabled:
        task.exporter.check(bench.compressor, bench.drop, bench.anatomy, bench.units)
    task.finish.check(bench.anatomy, bench.units)
    problem = bench.planned_problem(task.budget)
    bench.progress.say(bench.plan.coverage.text)
    if task.exporter.enabled:
        task.exporter.check_problem(problem, bench.anatomy)
    longest = max(split.seq_len for split in bench.splits.values())
    plan_memory(bench.resources, bench.anatomy, bench.plan.units, seq_len=longest)
    if is_static(bench.resources.activations) and not bench.builder.settings.input_ranges:
        raise no_ranges(bench.resources.activations, owner=bench.resources)
    sampler = task.sampler(problem=problem, seed=task.seed)
    check_levels(bench, sampler)
    check_limits(problem, sampler)
    check_ranked(task, sampler)
    columns = tuple(column for column in sampler.columns if column in MEASURES)
    if columns:
        bench.splits["search"].count("evaluate.sensitivity_tokens", bench.resources.sensitivity_tokens)
    if EMQ in columns and bench.resources.mq_bench is not None:
        check_bench(bench.resources.mq_bench, [unit.name for unit in problem.units])
    if problem.budget == problem.most:
        bench.progress.say(
            f"the budget {task.budget} allows every unit its largest level "
            f"({problem.bits_per_weight(problem.most):.3f} bits per weight): a smaller one leaves something to search"
        )
    task.tasks.questions()
    task.tracker.check()
    if task.tracker.away:
        bench.progress.say(f"{task.tracker.away}; the search goes on, and what is logged waits in {task.folder}")
    name = run_name(
        model=bench.loaded.name, sampler=sampler.name, budget=str(task.budget), seed=task.seed, varied=task.varied
    )
    return Draft(name, columns)


def run(task: Task, bench: Workbench, draft: Draft, notes: Notes) -> dict[str, Any]:
    """Run a checked task from level store to report.

    Args:
        task: The search.
        bench: The model, its text and its levels.
        draft: What ``check`` returned.
        notes: What is recorded beside the figures.

    Returns:
        The flat row of ``result.json``.
    """
    with _tracked(task, bench, draft, notes):
        problem, spent = measured_problem(task, bench, draft)
        recorder = _recorder(task, bench, draft)
        listeners = (
            AllocationFile(task.folder, problem),
            Behind(recorder, name="the study"),
            Behind(task.tracker, name="MLflow"),
        )
        with _settled(listeners):
            result = _searched(task, bench, draft, notes, problem, spent, listeners, recorder)
            result = with_front(task, bench, result)
            if result.front:
                write_front(task.storage.open(), f"{recorder.name} front", result, record=task.storage.record)
            result = described(task, bench, result)
            row = {**plain_row(task, bench, draft, notes, result), **comparable_row(task, bench, result)}
            write_result(task.folder, row)
            if task.export_now:
                result = _finished(task, bench, result, row)
            report = task.report.write(result, task.folder)
            end_search(result, listeners)
        task.tracker.deliver(result, report=report, run=task.folder, trial=recorder.winner)
        row["phases"] = {name: round(seconds, 2) for name, seconds in bench.seconds.items()}
    row["mlflow_link"] = task.tracker.link
    row["mlflow_run"] = task.tracker.run_id
    write_result(task.folder, row)
    replace(RunRecord.read(task.folder), finished=True).write(task.folder)
    _check_recorded(task, listeners)
    return row


def _finished(task: Task, bench: Workbench, result: SearchResult, row: dict[str, Any]) -> SearchResult:
    """Return the result with what finishing and exporting its winner gave; ``row`` is written with it.

    Args:
        task: The search.
        bench: The model and its levels.
        result: Of the search.
        row: Of ``result.json``.
    """
    genome = result.problem.encode(result.allocation)
    done = task.finish.run(
        genome, problem=result.problem, evaluator=bench.evaluator, seed=task.seed, progress=bench.progress
    )
    save_tuned(task.folder, done.tuned)
    row["finish"] = dict(done.facts)
    result = replace(result, finish=done.facts)
    if task.exporter.enabled:
        write_result(task.folder, row)
        facts = export(result, bench, task.exporter, task.folder / MODEL, tuned=done.tuned)
        facts = with_figures(facts, row, command=command_of(task.folder / CONFIG))
        result = replace(result, export={**facts, **({"register": task.register} if task.register else {})})
        row["export"] = dict(result.export)
    write_result(task.folder, row)
    return result


def _check_recorded(task: Task, listeners: Sequence[Any]) -> None:
    """Raise TrackingError where the study or the tracker lacks something; the run's folder has everything."""
    missing = [text for text in (*(listener.missing for listener in listeners), task.tracker.missing) if text]
    if missing:
        raise TrackingError(f"the result is in {task.folder}, but " + "; ".join(missing))


def export(
    result: SearchResult,
    bench: Workbench,
    exporter: Exporter,
    folder: Path,
    *,
    tuned: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Write a winner into a folder; return its path, size on disk, and the code that loads it.

    Args:
        result: Of the search.
        bench: The model and its levels.
        exporter: Writes the format.
        folder: Where to write.
        tuned: Parameters that are written instead of the dense model's, by name; None: no others.
    """
    with bench.timed("export"), replaced_parameters(bench.loaded.model, tuned or {}):
        return exporter.export(
            result.problem.encode(result.allocation),
            problem=result.problem,
            evaluator=bench.evaluator,
            loaded=bench.loaded,
            folder=folder,
            progress=bench.progress,
        )


def _recorder(task: Task, bench: Workbench, draft: Draft) -> StudyRecorder:
    """Return the recorder of the run's study, a new one or that of a run which goes on."""
    storage = task.storage.open()
    if task.storage.repaired:
        bench.progress.say(task.storage.repaired)
    known = RunRecord.read(task.folder).study if task.resume else None
    name = known or f"{draft.name} {datetime.now():%Y-%m-%d %H:%M:%S.%f}"[:-3]
    RunRecord(mlflow_run=task.tracker.run_id, study=name).write(task.folder)
    return StudyRecorder(
        storage=storage,
        name=name,
        record=task.storage.record,
        artifacts=task.storage.artifact_store(),
        light=True,
    )


def _searched(
    task: Task,
    bench: Workbench,
    draft: Draft,
    notes: Notes,
    problem: Problem,
    spent: int,
    listeners: Sequence[Listener],
    recorder: StudyRecorder,
) -> SearchResult:
    """Run the search, and leave its winner in ``allocation.json``."""
    state = task.folder / STATE
    study = recorder.study.study_name
    with scoring(task, bench, problem=problem, study=study, config=notes.config) as scorer:
        result = run_search(
            name=draft.name,
            sampler=_sampler(task, problem),
            scorer=scorer,
            plan=task.plan,
            dense=bench.dense,
            listeners=listeners,
            facts={
                "study": study,
                "store": bench.store.key,
                "mlflow_run": task.tracker.run_id,
                COVERAGE: round(bench.plan.coverage.share, 6),
                **notes.facts,
            },
            tokens_spent=spent,
            progress=bench.progress,
            state=_earlier(task, problem, bench),
            state_path=state,
            guard=task.guard,
            identity=identity_of(bench, task.fitness),
        )
    problem.save(result.allocation, task.folder / ALLOCATION, store=bench.store.key, **result.row())
    return result


def _sampler(task: Task, problem: Problem) -> PopulationSampler:
    """Return the sampler of a task, with the starts that the task adds to its own."""
    sampler = task.sampler(problem=problem, seed=task.seed)
    if task.more_starts is not None and sampler.takes_starts:
        sampler.more_starts = task.more_starts(sampler)
    return sampler


def _earlier(task: Task, problem: Problem, bench: Workbench) -> SearchState | None:
    """Return the state that a run which goes on stopped in; None for a new one, or before its first generation."""
    path = task.folder / STATE
    if not task.resume or not path.is_file():
        return None
    state = SearchState.read(path, problem=problem)
    if state.cut:
        bench.progress.say(f"{path} was cut short; going on after generation {state.generation - 1}, which is whole")
    else:
        bench.progress.say(f"going on after generation {state.generation - 1}")
    return state


def measured_problem(task: Task, bench: Workbench, draft: Draft) -> tuple[Problem, int]:
    """Return the problem with the columns that must be measured on the model, and the tokens that this took.

    What was measured is written into the task's folder, for other budgets.

    Args:
        task: The search.
        bench: The model and its levels.
        draft: Names the columns.
    """
    spent = 0
    found: dict[str, dict[str, float]] = {unit.name: {} for unit in bench.units_of_search}
    if task.columns is not None:
        return bench.problem(task.budget, with_columns(bench.units_of_search, task.columns)), spent
    problem = bench.problem(task.budget)
    if not draft.columns:
        return problem, spent
    with bench.timed("sensitivities"):
        for column in draft.columns:
            columns, tokens = measure(
                column,
                bench.evaluator,
                problem,
                tokens=bench.resources.sensitivity_tokens,
                seed=task.seed,
                progress=bench.progress,
            )
            spent += tokens
            for name, values in columns.items():
                found[name] |= values
    write_json(task.folder / MEASURED, {"tokens": spent, "columns": found})
    return bench.problem(task.budget, with_columns(bench.units_of_search, found)), spent


@contextmanager
def _tracked(task: Task, bench: Workbench, draft: Draft, notes: Notes) -> Iterator[None]:
    """Open the tracker's run, a new one or that of a run which goes on, and close it as finished, failed or killed."""
    tracker = task.tracker
    tracker.start(
        draft.name,
        params=notes.params,
        config=notes.config,
        multirun=notes.multirun,
        tags={"folder": str(task.folder.absolute()), **notes.tags},
        inputs=[
            TextInput(
                name=f"{notes.experiment} {split.name}",
                digest=split.hash,
                context=split.name,
                tokens=split.tokens,
                source=notes.source,
            )
            for split in bench.splits.values()
        ],
        device=bench.anatomy.device.type,
        folder=task.folder,
        run_id=RunRecord.read(task.folder).mlflow_run if task.resume else None,
        resumed=task.resume,
    )
    try:
        known = RunRecord.read(task.folder) if task.resume else RunRecord()
        replace(known, mlflow_run=tracker.run_id).write(task.folder)
        if notes.config:
            (task.folder / CONFIG).write_text(notes.config, encoding="utf-8")
        yield
    except BaseException as error:
        killed = isinstance(error, KeyboardInterrupt)
        reason = "interrupted" if killed else f"{type(error).__name__}: {error}"
        with suppress(Exception):  # what broke is known already
            tracker.close("KILLED" if killed else "FAILED", reason=reason)
            _keep_run(task)
        raise
    tracker.close("FINISHED")
    _keep_run(task)


def _keep_run(task: Task) -> None:
    """Write the id of the tracker's run down, which a server that was away gave late."""
    known = RunRecord.read(task.folder)
    if known.mlflow_run != task.tracker.run_id:
        replace(known, mlflow_run=task.tracker.run_id).write(task.folder)


@contextmanager
def _settled(listeners: Sequence[Any]) -> Iterator[None]:
    """Wait in the end, whatever happens, until the listeners have written everything."""
    try:
        yield
    except BaseException as error:
        for listener in listeners:
            with suppress(Exception):  # what broke is known already
                listener.wait(HURRY if isinstance(error, KeyboardInterrupt) else SETTLE)
        raise
    for listener in listeners:
        listener.wait(SETTLE)
