"""The smallest size that holds a quality: bisection over budgets, each searched from its nearest neighbour's winner."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from evosweep.budget_list import Job, beside, measured
from evosweep.core.allocation import Allocation
from evosweep.core.budget import Budget
from evosweep.core.errors import BudgetError
from evosweep.core.files import write_json
from evosweep.core.problem import Genome, Problem
from evosweep.core.results import RESULT, read_result
from evosweep.core.run_record import is_finished
from evosweep.core.target import Target
from evosweep.core.unit import with_columns
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity
from evosweep.pipeline import MEASURED, measured_problem, run
from evosweep.search.bisection import Bisection
from evosweep.task import Task
from evosweep.tracking.allocation_file import ALLOCATION
from evosweep.tracking.study.size_study import SizeStudy
from evosweep.workbench import Workbench

TARGET = "target.json"  # in a run's folder: the sizes that were searched, and whether they hold
TRACE = 7  # allocations without a search that the first size is guessed by
DIGITS = 10_000  # budgets are rounded up to so many parts of a bit per weight


@dataclass
class TargetSearch:
    """Looks for the smallest size that holds a target.

    Attributes:
        make: Returns the job of a budget.
        probe: The job of some budget: its sampler says where searches begin.
        bench: The model and its levels.
        target: What must hold.
        folder: Of the run.
        study: Records the sizes; None: nothing does.
        jobs: That were run, by size in bits.
        rows: Their results.
    """

    make: Callable[[Budget], Job]
    probe: Job
    bench: Workbench
    target: Target
    folder: Path
    study: SizeStudy | None = None
    jobs: dict[int, Job] = field(default_factory=dict)
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)

    def run(self) -> tuple[Job, dict[str, Any]]:
        """Run the searches; return the job and the result of the smallest size that holds.

        Raises:
            BudgetError: Not even the largest levels hold the target, or no search found a winner that does.
        """
        whole = self._whole
        columns = self._columns()
        bisection = Bisection(self.target.bound, whole.least, whole.most, self.target.within)
        bisection.trace(lambda size: self._start_loss(whole, columns, size), TRACE)
        for _ in range(self.target.searches):
            size = bisection.next()
            if size is None:
                break
            loss, bits = self._search(whole, size, columns)
            bisection.searched[bits] = loss
            self._record(whole, bisection, bits)
        if bisection.held is None:
            best = min(bisection.searched.values())
            raise BudgetError(
                f"no size of {len(bisection.searched)} searches holds target.{self.target}; the best reached "
                f"{self.target.shown(best)}: raise target.searches"
            )
        return self.jobs[bisection.held], self.rows[bisection.held]

    def quality(self, genome: Genome | None) -> dict[str, float]:
        """Return ``kl`` and ``ppl`` on the target's tokens of the search text; None is the dense model."""
        split = self.bench.splits["search"]
        count = min(len(split.windows), max(1, self.target.tokens // split.seq_len))
        windows = [index * len(split.windows) // count for index in range(count)]
        found = self.bench.evaluator.score(
            None if genome is None else genome[None], split="search", windows=windows, fitness=[KL(), Perplexity()]
        )
        return {name: float(values[0]) for name, values in found.items()}

    @cached_property
    def _dense(self) -> dict[str, float]:
        return self.quality(None)

    def _loss(self, genome: Genome) -> float:
        return self.target.loss(self.quality(genome), self._dense)

    @cached_property
    def _whole(self) -> Problem:
        """The problem of a budget that binds nothing."""
        return self.bench.problem(Budget(bits_per_weight=1e12))

    def check_reach(self) -> None:
        """Raise BudgetError where every unit at its largest level does not hold the target."""
        whole = self._whole
        reached = self._loss(whole.sizes - 1)
        if reached > self.target.bound:
            raise BudgetError(
                f"target.{self.target} is below what these levels reach: {self.target.shown(reached)} with every unit "
                f"at its largest level ({whole.bits_per_weight(whole.most):.3f} bits per weight)"
            )

    def _columns(self) -> Mapping[str, Mapping[str, float]]:
        """Return what the sampler needs of every unit, measured once for all sizes."""
        path = self.folder / MEASURED
        if not path.is_file():
            measured_problem(replace(self.probe.task, folder=self.folder), self.bench, self.probe.draft)
        return measured(self.folder)[0]

    def _budget(self, whole: Problem, size: int) -> Budget:
        return Budget(bits_per_weight=-(-size * DIGITS // int(whole.numels.sum())) / DIGITS)

    def _start_loss(self, whole: Problem, columns: Mapping[str, Mapping[str, float]], size: int) -> float:
        """Return the loss of where a search at this size begins."""
        task = self.probe.task
        problem = self.bench.problem(self._budget(whole, size), with_columns(self.bench.units_of_search, columns))
        return self._loss(task.sampler(problem=problem, seed=task.seed).genomes(generation=0, parents=[])[0])

    def _search(self, whole: Problem, size: int, columns: Mapping[str, Mapping[str, float]]) -> tuple[float, int]:
        """Search a size, or read what an earlier process found; return the winner's loss and the size in bits."""
        job = self.make(self._budget(whole, size))
        problem = self.bench.problem(job.task.budget, with_columns(self.bench.units_of_search, columns))
        bits = problem.budget
        task: Task = replace(job.task, columns=columns, export_now=False)
        if self.jobs:
            first = next(iter(self.jobs))
            near = min(self.jobs, key=lambda known: abs(known - bits))
            share = task.budget.others * int(self.rows[first]["tokens"]) / max(self.target.searches - 1, 1)
            task = beside(task, self.jobs[near].task, self.bench, columns=columns, tokens=int(share))
        if is_finished(task.folder):
            self.rows[bits] = read_result(task.folder / RESULT)
        else:
            self.bench.progress.say(f"target {self.target}: trying {problem.bits_per_weight(bits):.4f} bits per weight")
            self.rows[bits] = run(task, self.bench, job.draft, job.notes)
        self.jobs[bits] = replace(job, task=task)
        return self._loss(problem.encode(Allocation.load(task.folder / ALLOCATION))), bits

    def _record(self, whole: Problem, bisection: Bisection, bits: int) -> None:
        """Write down every size that was searched, and add the last one to the study."""
        steps = [
            {
                "folder": self.jobs[size].task.folder.name,
                "bits_per_weight": whole.bits_per_weight(size),
                "size_mb": whole.megabytes(size),
                self.target.kind: loss if self.target.kind == "kl" else float(np.exp(loss)),
                "holds": loss <= bisection.bound,
            }
            for size, loss in bisection.searched.items()
        ]
        held = bisection.held
        winner = None if held is None else self.jobs[held].task.folder.name
        write_json(self.folder / TARGET, {"target": str(self.target), "searched": steps, "winner": winner})
        if self.study is not None:
            self.study.add(steps[-1], excess=bisection.searched[bits] - bisection.bound)
        verdict = "holds" if steps[-1]["holds"] else "does not hold"
        reached = self.target.shown(bisection.searched[bits])
        self.bench.progress.say(f"{whole.bits_per_weight(bits):.4f} bits per weight: {reached}, {verdict}")
