"""Measures how much faster several processes score one search than one does, where scoring is a sleep.

``python benchmarks/workers.py`` uses a journal file; ``--url postgresql+psycopg://user@host/name`` a database as well.
Each process is one of its own, and the search is the loop of every run, with EvoPress's sampler on a made-up problem.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from evosweep.core.events import SearchResult
from evosweep.samplers.evopress import EvoPressSampler
from evosweep.search.loop import run_search
from evosweep.search.plan import Plan
from evosweep.search.protocols import Scorer
from evosweep.search.shared_scorer import SharedScorer, serve
from evosweep.search.sharing import Sharing
from evosweep.testing.problems import make_problem
from evosweep.tracking.study.database import Database
from evosweep.tracking.study.storage import Journal
from evosweep.tracking.study.work import StudyQueue

PLANS: dict[str, tuple[int, list[dict[str, int]]]] = {  # offspring and stages of search=small and search=paper
    "small": (16, [{"survivors": 4, "tokens": 512}, {"survivors": 1, "tokens": 2048}]),
    "paper": (
        64,
        [
            {"survivors": 8, "tokens": 2048},
            {"survivors": 2, "tokens": 8192},
            {"survivors": 1, "tokens": 32768},
        ],
    ),
}
STUDY = "benchmark"
LEASE = 20.0
PATIENCE = 60.0


class Sleeper:
    """Fitness of a linear problem; every candidate takes some seconds.

    Args:
        units: Of the problem.
        seconds: For each candidate.
    """

    seq_len = 512

    def __init__(self, units: int, seconds: float) -> None:
        self.weights = np.arange(units) % 5 - 2.0
        self.seconds = seconds

    def score(self, genomes: Any, **place: Any) -> Any:
        """Return the fitness of genomes after a while."""
        del place
        time.sleep(self.seconds * len(genomes))
        return 50 + genomes @ self.weights

    def validate(self, genome: Any) -> dict[str, float]:
        """Return the fitness of a genome at once."""
        return {"kl": float(50 + genome @ self.weights), "ppl": 1.0}


def searched(scorer: Scorer, plan: str, generations: int) -> tuple[SearchResult, float]:
    """Return the result of a search, and how long it took in seconds."""
    offspring, stages = PLANS[plan]
    sampler = EvoPressSampler(make_problem(), seed=0, offspring=offspring)
    began = time.monotonic()
    result = run_search(
        name="benchmark",
        sampler=sampler,
        scorer=scorer,
        plan=Plan.of(generations=generations, stages=stages),
        dense={"kl": 0.0, "ppl": 1.0},
        listeners=[],
    )
    return result, time.monotonic() - began


def open_storage(where: str) -> Any:
    """Return the storage of a journal's path or a database's URL."""
    return (Database(url=where) if "://" in where else Journal(path=where)).open()


def work(where: str, seconds: float, name: str, ready: Any) -> None:
    """Serve as one worker."""
    problem = make_problem()
    queue = StudyQueue(storage=open_storage(where), study=STUDY)
    queue.join(name)
    ready.release()
    scorer: Any = Sleeper(len(problem.units), seconds)
    serve(queue, scorer, problem=problem, worker=name, lease=LEASE, patience=PATIENCE)


def shared(where: str, options: argparse.Namespace) -> tuple[SearchResult, float]:
    """Return the result of a search by several processes, and its seconds once all have joined."""
    context = multiprocessing.get_context("spawn")
    queue = StudyQueue(storage=open_storage(where), study=STUDY, create=True)
    ready = context.Semaphore(0)
    workers = [
        context.Process(target=work, args=(where, options.seconds, f"w{number}", ready))
        for number in range(options.processes - 1)
    ]
    for worker in workers:
        worker.start()
    for _ in workers:
        ready.acquire()
    problem = make_problem()
    own: Any = Sleeper(len(problem.units), options.seconds)
    scorer = SharedScorer(own, queue, problem, Sharing(parts=options.parts or options.processes, lease=LEASE))
    result, seconds = searched(scorer, options.plan, options.generations)
    queue.close()
    for worker in workers:
        worker.join()
    return result, seconds


def best_ratio(result: SearchResult, processes: int) -> float:
    """Return how many times as fast a search can be at most: a candidate is not divided between processes."""
    counts = [stage.scored for record in result.generations for stage in record.stages]
    return sum(counts) / sum(-(-count // processes) for count in counts)


def main() -> None:
    """Print seconds and speed-up of every storage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--parts", type=int, help="of a stage; by default one for each process")
    parser.add_argument("--seconds", type=float, default=0.2, help="that scoring a candidate takes")
    parser.add_argument("--plan", choices=list(PLANS), default="paper")
    parser.add_argument("--generations", type=int, default=3)
    parser.add_argument("--url", help="of a database")
    options = parser.parse_args()
    problem = make_problem()
    alone: Any = Sleeper(len(problem.units), options.seconds)
    reference, before = searched(alone, options.plan, options.generations)
    most = best_ratio(reference, options.processes)
    print(f"1 process: {before:.2f} s; {options.processes} can be {most:.2f} times as fast at most")
    with tempfile.TemporaryDirectory() as folder:
        for where in [str(Path(folder) / "parts.journal"), *([options.url] if options.url else [])]:
            result, seconds = shared(where, options)
            same = [record.elite.hash for record in result.generations] == [
                record.elite.hash for record in reference.generations
            ]
            kind = where.partition(":")[0] if "://" in where else "journal"
            print(
                f"{options.processes} processes, {kind}: {seconds:.2f} s, {before / seconds:.2f} times as fast, "
                f"{'the same' if same else 'other'} elites"
            )


if __name__ == "__main__":
    main()
