"""Parts of a stage, claims and leases, on Optuna's storages, with several threads and processes."""

import multiprocessing
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from optuna.storages import BaseStorage, InMemoryStorage

from evosweep.core.errors import SettingError
from evosweep.core.problem import Problem
from evosweep.search.shared_scorer import SharedScorer, serve
from evosweep.search.sharing import (
    DONE,
    RUNNING,
    VOID,
    WAITING,
    Entry,
    Leases,
    Part,
    Sharing,
    beating,
    cut,
    dump_array,
    joined,
    load_array,
)
from evosweep.testing.problems import make_problem
from evosweep.tracking.study.storage import Journal
from evosweep.tracking.study.work import StudyQueue

WORKERS = 3
PLACE = {"generation": 3, "stage": 1, "tokens": 64}


class Sum:
    """Fitness that follows from genome and place alone, and a list of what was scored."""

    seq_len = 64

    def __init__(self, fails: int = 0) -> None:
        self.scored: list[bytes] = []
        self.fails = fails

    def score(self, genomes, *, generation: int, stage: int, tokens: int):
        if self.fails:
            self.fails -= 1
            raise MemoryError
        self.scored += [genome.tobytes() for genome in genomes]
        return genomes @ np.arange(1.0, genomes.shape[1] + 1) / 7 + generation + stage / tokens

    def losses(self, genomes, *, windows: slice, length: int, **place):
        own = self.score(genomes, **place).astype(np.float32)
        return own[:, None, None] + np.arange(windows.start, windows.stop)[None, :, None] + np.zeros(length - 1)

    def score_all(self, genomes, *, limit):
        return self.score(genomes, generation=0, stage=0, tokens=limit or 1)


@pytest.fixture(params=["memory", "journal"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> BaseStorage:
    return InMemoryStorage() if request.param == "memory" else Journal(path=str(tmp_path / "parts.journal")).open()


def genomes_of(problem: Problem, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, problem.sizes, size=(count, len(problem.units)))


def queue_of(storage: BaseStorage) -> StudyQueue:
    return StudyQueue(storage=storage, study="s", create=True)


def shared(queue: StudyQueue, problem: Problem, scorer: Sum, parts: int = 4, lease: float = 20.0) -> SharedScorer:
    return SharedScorer(scorer, queue, problem, Sharing(parts=parts, lease=lease))


def test_parts_hold_every_genome_once_in_order(problem: Problem) -> None:
    genomes = genomes_of(problem, 7)
    for parts in (1, 3, 7, 20):
        made = cut("score", PLACE, genomes, problem=problem, parts=parts)
        assert len(made) == min(parts, 7) and all(part.genomes for part in made)
        assert max(len(part.genomes) for part in made) - min(len(part.genomes) for part in made) <= 1
        results = [dump_array(Part.load(part.dump()).run(Sum(), problem)) for part in made]
        assert (joined(results) == Sum().score(genomes, **PLACE)).all()
    assert len({part.key for part in cut("score", PLACE, genomes, problem=problem, parts=7)}) == 7


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_come_back_to_the_bit(dtype: type) -> None:
    values = np.array([[0.1, np.nan, np.inf], [-0.0, 1e-300, 3.0]]).astype(dtype)
    again = load_array(dump_array(values))
    assert again.dtype == dtype and again.tobytes() == values.tobytes()


def test_a_lease_ends_when_no_beat_is_new_for_its_length() -> None:
    part = Part("score", PLACE, ("0",))
    leases = Leases(10.0)

    def late(beat: int, now: float) -> list[int]:
        return [entry.ticket for entry in leases.expired([Entry(5, part, RUNNING, "w", beat)], now=now)]

    assert late(0, 100.0) == late(0, 109.9) == []  # the clock starts when the leader first looks
    assert late(1, 110.0) == late(1, 119.9) == []
    assert late(1, 120.0) == [5]


@pytest.mark.parametrize("given", [{"parts": 0}, {"parts": 2.0}, {"lease": 0}, {"lease": "long"}])
def test_settings_that_cannot_be_used(given: dict) -> None:
    with pytest.raises(SettingError, match=next(iter(given))):
        Sharing(**given)


def test_a_part_is_claimed_once_and_ends_once(storage: BaseStorage) -> None:
    queue = queue_of(storage)
    ticket = queue.publish(Part("score", PLACE, ("01",)))
    assert [entry.state for entry in queue.unfinished()] == [WAITING]
    assert queue.claim(ticket) and not queue.claim(ticket)
    assert queue.beat(ticket, "first", 0) and queue.beat(ticket, "first", 7)
    (entry,) = queue.unfinished()
    assert (entry.state, entry.holder, entry.beat) == (RUNNING, "first", 7)
    assert queue.void(ticket, "silent") and not queue.beat(ticket, "first", 8)
    assert not queue.finish(ticket, {"late": 1}) and not queue.claim(ticket)
    assert (queue.entry(ticket).state, queue.entry(ticket).result) == (VOID, None)
    other = queue.publish(Part("score", PLACE, ("02",)))
    assert queue.claim(other) and queue.finish(other, {"value": 1})
    assert not queue.void(other, "silent") and queue.unfinished() == []
    assert (queue.entry(other).state, queue.entry(other).result) == (DONE, {"value": 1})


def test_alone_the_leader_scores_everything_once(storage: BaseStorage, problem: Problem) -> None:
    genomes = genomes_of(problem, 9)
    scorer = Sum()
    leader = shared(queue_of(storage), problem, scorer)
    assert (leader.score(genomes, **PLACE) == Sum().score(genomes, **PLACE)).all()
    assert Counter(scorer.scored) == Counter(genome.tobytes() for genome in genomes)
    windows = {**PLACE, "windows": slice(1, 3), "length": 5}
    assert (leader.losses(genomes, **windows) == Sum().losses(genomes, **windows)).all()
    assert (leader.score_all(genomes, limit=None) == Sum().score_all(genomes, limit=None)).all()


def test_threads_share_parts_and_none_is_scored_twice(storage: BaseStorage, problem: Problem) -> None:
    queue = queue_of(storage)
    scorers = [Sum() for _ in range(WORKERS)]
    threads = [
        threading.Thread(
            target=serve,
            args=(StudyQueue(storage=storage, study="s"), scorer),
            kwargs={"problem": problem, "worker": f"w{number}", "lease": 20.0, "patience": 60.0},
        )
        for number, scorer in enumerate(scorers)
    ]
    for thread in threads:
        thread.start()
    own = Sum()
    leader = shared(queue, problem, own, parts=20)
    genomes = genomes_of(problem, 20)
    for generation in range(5):
        place = {**PLACE, "generation": generation}
        assert (leader.score(genomes, **place) == Sum().score(genomes, **place)).all()
    queue.close()
    for thread in threads:
        thread.join()
    scored = Counter(genome for scorer in (own, *scorers) for genome in scorer.scored)
    assert scored == Counter({genome.tobytes(): 5 for genome in genomes})


def work(path: str, number: int, ready) -> None:
    queue = StudyQueue(storage=Journal(path=path).open(), study="s")
    ready.release()
    options = {"lease": 20.0, "patience": 60.0}
    serve(queue, Sum(), problem=make_problem(), worker=f"w{number}", **options)


def test_processes_share_parts_on_a_journal(tmp_path: Path, problem: Problem) -> None:
    path = str(tmp_path / "parts.journal")
    queue = queue_of(Journal(path=path).open())
    context = multiprocessing.get_context("fork")
    ready = context.Semaphore(0)
    processes = [context.Process(target=work, args=(path, number, ready)) for number in range(WORKERS)]
    for process in processes:
        process.start()
    for _ in processes:
        assert ready.acquire(timeout=60)
    genomes = genomes_of(problem, 30)
    leader = shared(queue, problem, Sum(), parts=30)
    assert (leader.score(genomes, **PLACE) == Sum().score(genomes, **PLACE)).all()
    entries = queue.known()
    queue.close()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * WORKERS
    assert len(entries) == 30 and {entry.state for entry in entries} == {DONE}
    assert sorted({len(entry.part.genomes) for entry in entries}) == [1]


def test_what_a_dead_worker_held_is_scored_by_others_and_its_late_result_is_dropped(
    storage: BaseStorage, problem: Problem
) -> None:
    queue = queue_of(storage)
    genomes = genomes_of(problem, 4)
    (part, *_) = cut("score", PLACE, genomes, problem=problem, parts=4)
    ticket = queue.publish(part)
    assert queue.claim(ticket)
    scorer = Sum()
    leader = shared(queue, problem, scorer, lease=0.2)
    assert (leader.score(genomes, **PLACE) == Sum().score(genomes, **PLACE)).all()
    assert len(scorer.scored) == 4 and queue.entry(ticket).state == VOID
    assert not queue.finish(ticket, dump_array(np.array([1e9])))


def test_a_new_leader_takes_results_over_and_scores_only_what_is_missing(
    storage: BaseStorage, problem: Problem
) -> None:
    queue = queue_of(storage)
    genomes = genomes_of(problem, 4)
    first, second, third, _ = cut("score", PLACE, genomes, problem=problem, parts=4)
    done, held, waiting = queue.publish(first), queue.publish(second), queue.publish(third)
    assert queue.claim(done) and queue.finish(done, dump_array(first.run(Sum(), problem)))
    assert queue.claim(held) and queue.beat(held, "leader", 0)  # the leader that was killed
    scorer = Sum()
    leader = shared(queue, problem, scorer)
    assert (leader.score(genomes, **PLACE) == Sum().score(genomes, **PLACE)).all()
    assert Counter(scorer.scored) == Counter(genome.tobytes() for genome in genomes[1:])
    assert queue.entry(held).state == queue.entry(waiting).state == VOID


def test_a_worker_that_fails_gives_its_part_back(storage: BaseStorage, problem: Problem) -> None:
    queue = queue_of(storage)
    (part,) = cut("score", PLACE, genomes_of(problem, 2), problem=problem, parts=1)
    ticket = queue.publish(part)
    with pytest.raises(MemoryError):
        serve(queue, Sum(fails=1), problem=problem, worker="w", lease=20.0, patience=60.0)
    entry = queue.entry(ticket)
    assert (entry.state, entry.holder, entry.reason) == (VOID, "w", "MemoryError")


def test_a_worker_without_work_ends(storage: BaseStorage, problem: Problem) -> None:
    served = serve(queue_of(storage), Sum(), problem=problem, worker="w", lease=20.0, patience=0.1)
    assert (served.ended, served.parts) == ("idle", 0)


def test_beats_go_on_while_a_storage_is_away_and_end_when_refused() -> None:
    seen: list[int] = []
    enough = threading.Event()

    def beat(count: int) -> bool:
        seen.append(count)
        if count == 2:
            raise OSError
        if count == 4:
            enough.set()
        return count < 4

    with beating(beat, every=0.005):
        assert enough.wait(30)
    assert seen == [0, 1, 2, 3, 4]
