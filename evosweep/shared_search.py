"""What makes scoring the same in two processes, and the scorer of a search that shares it with workers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from evosweep import __version__
from evosweep.core.errors import EvosweepError
from evosweep.core.problem import Problem
from evosweep.fitness.base import Fitness
from evosweep.models.activations import NONE
from evosweep.search.protocols import Scorer
from evosweep.search.shared_scorer import SharedScorer
from evosweep.task import Task
from evosweep.tracking.study.work import StudyQueue
from evosweep.workbench import Workbench

NAMES = {"store": "level store", "text": "search text", "problem": "problem", "evosweep": "version of evosweep"}


def identity_of(bench: Workbench, fitness: Fitness) -> dict[str, Any]:
    """Return what the fitness of an allocation follows from, beside the seed, as JSON values."""
    activations = bench.resources.activations
    return {
        "store": bench.store.key,
        "text": bench.splits["search"].hash,
        "fitness": fitness.name,
        **({} if activations == NONE else {"activations": activations}),
    }


def shared_identity(bench: Workbench, fitness: Fitness, *, problem: Problem, seed: int) -> dict[str, Any]:
    """Return what must be the same in all processes that score one search, as JSON values.

    Args:
        bench: The model, its text and its levels.
        fitness: What is scored.
        problem: Units, levels and budget.
        seed: Of the search.
    """
    return {"evosweep": __version__, "seed": seed, "problem": problem.fingerprint, **identity_of(bench, fitness)}


def check_same(mine: Mapping[str, Any], other: Mapping[str, Any], *, whose: str) -> None:
    """Raise EvosweepError where two processes do not score the same search, naming what differs.

    Args:
        mine: ``shared_identity`` of this process.
        other: Of the other one.
        whose: Names the other's search.
    """
    for key in dict.fromkeys([*other, *mine]):
        if mine.get(key) != other.get(key):
            raise EvosweepError(
                f"{whose} is of another problem: its {NAMES.get(key, key)} is {other.get(key)!r}, here it is "
                f"{mine.get(key)!r}; give both the same model, text, levels, budget and seed"
            )


@contextmanager
def scoring(task: Task, bench: Workbench, *, problem: Problem, study: str, config: str) -> Iterator[Scorer]:
    """Yield the scorer of a search; workers can join it until the block has ended well.

    Where the block fails or is stopped, the parts stay in the storage: the run can go on, and so can its workers.

    Args:
        task: The search.
        bench: The model and its levels.
        problem: Units, levels and budget.
        study: Name of the search's study.
        config: Text of its configuration, for workers that do not see its folder.
    """
    scorer = task.scorer(evaluator=bench.evaluator, fitness=task.fitness, seed=task.seed)
    if task.sharing.parts is None:
        yield scorer
        return
    identity = shared_identity(bench, task.fitness, problem=problem, seed=task.seed)
    queue = StudyQueue(storage=task.storage.open(), study=study, create=True)
    if queue.search is not None:
        check_same(identity, queue.search["identity"], whose=f"the study {study!r} in this storage")
    queue.describe({"identity": identity, "config": config, "parts": task.sharing.parts, "lease": task.sharing.lease})
    yield SharedScorer(scorer, queue, problem, task.sharing, bench.progress)
    queue.close()
