"""Several budgets in one run: one store, one measurement, and winners that are starts for their neighbours.

The budget in the middle is searched first and in full. Then the others, outwards: each begins at the winner of its
nearest neighbour, moved to its own size, and all of them together get a share of the first one's tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evosweep.core.allocation import Allocation
from evosweep.core.budget import Budget
from evosweep.core.errors import BudgetError, EvosweepError, SettingError
from evosweep.core.problem import Genome, Problem
from evosweep.core.results import RESULT, read_result
from evosweep.core.run_record import is_finished
from evosweep.core.unit import with_columns
from evosweep.pipeline import MEASURED, run
from evosweep.samplers.base import PopulationSampler
from evosweep.search.plan import Plan
from evosweep.search.transfer import transferred
from evosweep.task import Draft, Notes, Task
from evosweep.tracking.allocation_file import ALLOCATION
from evosweep.workbench import Workbench

STARTS = 4  # genomes that a neighbour's winner is moved to


@dataclass(frozen=True)
class Job:
    """One search of a list of budgets: the arguments that ``pipeline.run`` gets for it.

    Attributes:
        task: Sampler, plan, exporter and the other objects.
        draft: What checking it gave.
        notes: Texts that are logged with the run.
    """

    task: Task
    draft: Draft
    notes: Notes


def check_budgets(budgets: Sequence[Budget], bench: Workbench) -> None:
    """Raise an error where a budget cannot be met, before any work; of several it names all that cannot.

    Raises:
        BudgetError: Some are below what the levels allow.
        SettingError: Two are the same size here, or a single one cannot be used.
    """
    wrong: list[tuple[Budget, BudgetError]] = []
    sizes: dict[int, Budget] = {}
    for budget in budgets:
        try:
            bits = bench.planned_problem(budget).budget
        except BudgetError as error:
            wrong.append((budget, error))
            continue
        if bits in sizes:
            raise SettingError(
                budgets[0].kind,
                owner=budget,
                allowed="budgets of different size here",
                got=[sizes[bits].value, budget.value],
            )
        sizes[bits] = budget
    if len(wrong) == 1 or len(wrong) == len(budgets):
        raise wrong[0][1]
    if wrong:
        values = ", ".join(str(budget).partition(" ")[0].partition("=")[2] for budget, _ in wrong)
        raise BudgetError(f"{len(wrong)} of {len(budgets)} budgets cannot be met ({values}): {wrong[-1][1]}")


def order_of(sizes: Sequence[int]) -> list[tuple[int, int | None]]:
    """Return the order of searches: the index of each budget, and of the finished one nearest to it.

    Args:
        sizes: Bits of every budget.
    """
    rising = sorted(range(len(sizes)), key=lambda index: sizes[index])
    order: list[tuple[int, int | None]] = [(rising[len(rising) // 2], None)]
    while len(order) < len(sizes):
        done = [index for index, _ in order]
        open_ = [index for index in rising if index not in done]
        pairs = [(abs(sizes[index] - sizes[other]), index, other) for index in open_ for other in done]
        _, index, other = min(pairs)
        order.append((index, other))
    return order


def run_budgets(jobs: Sequence[Job], bench: Workbench, *, share: float) -> list[dict[str, Any]]:
    """Run the searches of several budgets; return the row of each, in the order of ``jobs``.

    Those that an earlier process finished are not run again.

    Args:
        jobs: One for each budget, alike in everything else.
        bench: The model and its levels.
        share: Tokens that all searches but the first get together, over those of the first.
    """
    sizes = [bench.problem(job.task.budget).budget for job in jobs]
    order = order_of(sizes)
    first = jobs[order[0][0]]
    rows: dict[int, dict[str, Any]] = {}
    for index, near in order:
        job = jobs[index]
        if is_finished(job.task.folder):
            rows[index] = read_result(job.task.folder / RESULT)
            continue
        task = job.task
        if near is not None:
            columns, spent = measured(first.task.folder)
            tokens = int(share * (int(rows[order[0][0]]["tokens"]) - spent) / (len(jobs) - 1))
            task = beside(task, jobs[near].task, bench, columns=columns, tokens=tokens)
        bench.progress.say(f"budget {task.budget}, {len(rows) + 1} of {len(jobs)}")
        rows[index] = run(task, bench, job.draft, job.notes)
    return [rows[index] for index in range(len(jobs))]


def measured(folder: Path) -> tuple[dict[str, dict[str, float]], int]:
    """Return what a run measured before its search, by the unit's name, and the tokens that this took.

    Args:
        folder: Of the run.

    Raises:
        EvosweepError: The file is damaged.
    """
    path = folder / MEASURED
    if not path.is_file():
        return {}, 0
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): dict(values) for name, values in found["columns"].items()}, int(found["tokens"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvosweepError(
            f"{path}, which holds what was measured of every unit, is damaged or was cut short ({error}): start the "
            "run anew"
        ) from error


def beside(
    task: Task, near: Task, bench: Workbench, *, columns: Mapping[str, Mapping[str, float]], tokens: int
) -> Task:
    """Return a task that starts at a neighbour's winner and gets so many tokens.

    Args:
        task: Of this budget.
        near: Of the neighbour, whose search is over.
        bench: The model and its levels.
        columns: What was measured of every unit.
        tokens: That the search may score.
    """
    units = with_columns(bench.units_of_search, columns)
    problem = bench.problem(near.budget, units)
    winner = problem.encode(Allocation.load(near.folder / ALLOCATION))

    def starts(sampler: PopulationSampler) -> list[Genome]:
        return transferred(
            winner, sampler.problem, starts=_starts(sampler, near, problem), seed=task.seed, count=STARTS
        )

    here = bench.problem(task.budget, units)
    plan = _shortened(task, here, bench, tokens)
    return replace(task, columns=columns, more_starts=starts, plan=plan)


def _starts(sampler: PopulationSampler, near: Task, problem: Problem) -> tuple[Genome, Genome] | None:
    """Return where a neighbour's search began, and where this one does; None where either begins at several places."""
    before = near.sampler(problem=problem, seed=near.seed).genomes(generation=0, parents=[])
    here = sampler.genomes(generation=0, parents=[])
    return (before[0], here[0]) if len(before) == len(here) == 1 else None


def _shortened(task: Task, problem: Problem, bench: Workbench, tokens: int) -> Plan:
    """Return a task's plan with as many generations as so many tokens allow, its start and last choice counted."""
    sampler = task.sampler(problem=problem, seed=task.seed)
    if not sampler.takes_starts:
        return task.plan
    scorer = task.scorer(evaluator=bench.evaluator, fitness=task.fitness, seed=task.seed)
    final = scorer.final_tokens(task.plan.final_limit) if task.plan.final else 0
    start = task.plan.stages.tokens_of(sampler.size(0) + STARTS, parents=0)
    tokens_each = task.plan.stages.tokens_of(sampler.size(1), parents=sampler.population_size)
    generations = max(0, (tokens - start - final) // max(tokens_each + final, 1))
    return replace(task.plan, generations=min(int(generations), task.plan.generations))
