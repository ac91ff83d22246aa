"""A scorer that shares its work with other processes, and the loop in which those work."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from evosweep.core.events import Progress, Silent
from evosweep.core.problem import Genome, Problem
from evosweep.search.protocols import Genomes, Scorer
from evosweep.search.sharing import (
    BEATS,
    DONE,
    RUNNING,
    WAITING,
    Entry,
    Leases,
    Part,
    Pause,
    Sharing,
    WorkQueue,
    beating,
    cut,
    dump_array,
    joined,
)

LEADER = "leader"  # the process that searches
TRIES = 4  # claims of a part that may be lost before the leader scores it beside the queue
CLOSED_EVERY = 1.0  # seconds between two looks at whether the search is over


@dataclass
class SharedScorer:
    """Scorer that cuts every call into parts, which workers and this process score.

    The result is that of the scorer itself on those parts, whoever scores them and in whatever order.

    Args:
        scorer: Scores the parts that this process takes, and validates.
        queue: Where parts are published.
        problem: Units and levels.
        sharing: How many parts, and how long a lease.
        progress: Shows which parts were lost.
    """

    scorer: Scorer
    queue: WorkQueue
    problem: Problem
    sharing: Sharing
    progress: Progress = field(default_factory=Silent)
    _kept: dict[str, Entry] = field(init=False)  # what an earlier process of this search left, by the part's key
    _leases: Leases = field(init=False)
    _generation: int | None = field(default=None, init=False)  # that is being scored
    _most: int = field(default=0, init=False)  # parts of its largest stage
    _idle_said: int = field(default=0, init=False)  # processes at which idle ones were mentioned

    def __post_init__(self) -> None:
        self._leases = Leases(self.sharing.lease)
        self._kept = {}
        for entry in self.queue.known():
            if entry.state == DONE or (entry.state == RUNNING and entry.holder != LEADER):
                self._kept[entry.part.key] = entry
            elif entry.state in (WAITING, RUNNING):  # of a leader that is gone: this one publishes what it needs
                self.queue.void(entry.ticket, "the search was interrupted")

    @property
    def seq_len(self) -> int:
        """Tokens a window."""
        return self.scorer.seq_len

    def score(self, genomes: Genomes, *, generation: int, stage: int, tokens: int) -> npt.NDArray[np.float64]:
        """Return the fitness of genomes, as in ``Scorer``.

        Args:
            genomes: Level indices, shape (genomes, units).
            generation: 0, 1, 2 ...
            stage: Index of the stage.
            tokens: How many tokens the stage scores a genome on.
        """
        return self._call("score", {"generation": generation, "stage": stage, "tokens": tokens}, genomes)

    def losses(
        self, genomes: Genomes, *, generation: int, stage: int, tokens: int, windows: slice, length: int
    ) -> npt.NDArray[np.float32]:
        """Return the loss of genomes on each token, as in ``Scorer``.

        Args:
            genomes: Level indices, shape (genomes, units).
            generation: 0, 1, 2 ...
            stage: Index of the stage.
            tokens: How many tokens the stage has in all.
            windows: Which of the stage's windows.
            length: How many tokens of each window, from its start.
        """
        arguments = {
            "generation": generation,
            "stage": stage,
            "tokens": tokens,
            "windows": [windows.start, windows.stop],
            "length": length,
        }
        return self._call("losses", arguments, genomes)

    def reduce(self, loss: float) -> float:
        """Return the fitness that a mean loss per token stands for."""
        return self.scorer.reduce(loss)

    def score_all(self, genomes: Genomes, *, limit: int | None) -> npt.NDArray[np.float64]:
        """Return the fitness of genomes on every search token, or on at most ``limit`` of them."""
        return self._call("score_all", {"limit": limit}, genomes)

    def final_tokens(self, limit: int | None) -> int:
        """Return on how many tokens ``score_all`` scores a genome."""
        return self.scorer.final_tokens(limit)

    def validate(self, genome: Genome) -> dict[str, float]:
        """Return the validation figures; this process measures them."""
        return self.scorer.validate(genome)

    def _call(self, call: str, arguments: Mapping[str, Any], genomes: Genomes) -> npt.NDArray[Any]:
        parts = cut(call, arguments, genomes, problem=self.problem, parts=self.sharing.parts or 1)
        self._watch_idle(arguments.get("generation"), len(parts))
        return joined(self._results(parts))

    def _results(self, parts: Sequence[Part]) -> list[Mapping[str, Any]]:
        """Return the result of every part: publish them, score along, and look after those that others hold."""
        tickets = {self._ticket(part): part for part in parts}
        tries = dict.fromkeys((part.key for part in parts), 1)
        found: dict[str, Mapping[str, Any]] = {}
        pause = Pause()
        while True:
            entries = {entry.ticket: entry for entry in self.queue.unfinished() if entry.state != DONE}
            for ticket in [ticket for ticket in tickets if ticket not in entries]:
                self._collect(ticket, tickets, found, tries)
            if not tickets:
                return [found[part.key] for part in parts]
            mine = [entry for ticket, entry in entries.items() if ticket in tickets]
            if self._score_one(mine):
                pause = Pause()
                continue
            running = [entry for entry in mine if entry.state == RUNNING]
            for entry in self._leases.expired(running, now=time.monotonic()):
                self.queue.void(entry.ticket, f"no sign of life for {self.sharing.lease:g} s")
            pause.wait()

    def _ticket(self, part: Part) -> int:
        """Return the ticket of a part: the one that an earlier process left, or a new one."""
        kept = self._kept.pop(part.key, None)
        return self.queue.publish(part) if kept is None else kept.ticket

    def _collect(
        self, ticket: int, tickets: dict[int, Part], found: dict[str, Mapping[str, Any]], tries: dict[str, int]
    ) -> None:
        """Take the result of a part that is over, or publish it again.

        Args:
            ticket: Of the part.
            tickets: Parts that are not done yet; changed.
            found: Results by key; changed.
            tries: How often each part was published; changed.
        """
        part = tickets.pop(ticket)
        entry = self.queue.entry(ticket)
        if entry.state == DONE and entry.result is not None:
            found[part.key] = entry.result
            return
        self.progress.say(
            f"{entry.holder or 'a worker'} lost {len(part.genomes)} candidates ({entry.reason}); others score them"
        )
        if tries[part.key] >= TRIES:
            found[part.key] = dump_array(part.run(self.scorer, self.problem))
            return
        tries[part.key] += 1
        tickets[self.queue.publish(part)] = part

    def _score_one(self, entries: Sequence[Entry]) -> bool:
        """Score one of the parts that wait; return whether there was one."""
        for entry in entries:
            if entry.state == WAITING and self.queue.claim(entry.ticket):
                with beating(partial(self.queue.beat, entry.ticket, LEADER), every=self.sharing.lease / BEATS):
                    result = dump_array(entry.part.run(self.scorer, self.problem))
                self.queue.finish(entry.ticket, result)
                return True
        return False

    def _watch_idle(self, generation: int | None, parts: int) -> None:
        """Say once, after a generation, that there were more processes than its largest stage had parts."""
        if generation == self._generation:
            self._most = max(self._most, parts)
            return
        most = self._most if self._generation else 0  # of the generation that is over; the start is a few candidates
        self._generation = generation
        self._most = parts
        processes = len(self.queue.workers()) + 1
        if most and processes > max(most, self._idle_said):
            self._idle_said = processes
            few = "workers.parts" if most == self.sharing.parts else "search.offspring"
            self.progress.say(
                f"{processes} processes share the scoring, but a stage has {most} parts at most: the others wait; "
                f"raise {few} to use them"
            )


@dataclass
class Served:
    """How many parts and candidates a worker scored, and why it ended.

    Attributes:
        parts: That it scored.
        candidates: In them.
        late: Parts whose results came too late.
        ended: Why it ended: ``finished``, or ``idle``.
    """

    parts: int = 0
    candidates: int = 0
    late: int = 0
    ended: str = ""


def serve(queue: WorkQueue, scorer: Scorer, *, problem: Problem, worker: str, lease: float, patience: float) -> Served:
    """Score parts of another process's search until it is over; return what was done.

    Args:
        queue: Where the parts are.
        scorer: The same as the search's.
        problem: The same as the search's.
        worker: Name of this process, like no other's.
        lease: Seconds after which a worker without a sign of life loses its part.
        patience: Seconds without any work after which the worker ends.
    """
    served = Served()
    looked = time.monotonic()
    pause = Pause()
    while not served.ended:
        entry = next((e for e in queue.unfinished() if e.state == WAITING and queue.claim(e.ticket)), None)
        if entry is not None:
            _serve_one(queue, scorer, entry, problem=problem, worker=worker, lease=lease, served=served)
            pause = Pause()
            continue
        now = time.monotonic()
        if now - looked >= CLOSED_EVERY:
            looked = now
            served.ended = "finished" if queue.closed() else "idle" if now - pause.began >= patience else ""
        pause.wait()
    return served


def _serve_one(
    queue: WorkQueue, scorer: Scorer, entry: Entry, *, problem: Problem, worker: str, lease: float, served: Served
) -> None:
    """Score a claimed part, or give it back where that fails.

    Args:
        queue: Where it is from.
        scorer: Scores it.
        entry: The part.
        problem: Units and levels.
        worker: Name of this process.
        lease: Seconds.
        served: Counts; changed.
    """
    try:
        with beating(partial(queue.beat, entry.ticket, worker), every=lease / BEATS):
            result = dump_array(entry.part.run(scorer, problem))
    except BaseException as error:
        queue.void(entry.ticket, "it was stopped" if isinstance(error, KeyboardInterrupt) else type(error).__name__)
        raise
    if queue.finish(entry.ticket, result):
        served.parts += 1
        served.candidates += len(entry.part.genomes)
    else:
        served.late += 1
