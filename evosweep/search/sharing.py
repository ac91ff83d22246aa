"""What processes that share a search's scoring exchange: parts of a stage, who holds each, and what it scored.

The process that searches publishes the parts of a stage, everybody claims and scores them, and it puts the results
together in their order. A part names its genomes and tokens completely, so the result is the same whoever scores it. A
claim is void when its holder has shown no sign of life for the length of a lease; the part is then published again, and
what the first holder may still deliver is refused by the queue.
"""

import base64
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from evosweep.core.checks import check_int, check_number
from evosweep.core.files import digest
from evosweep.core.genomes import genome_from_text, genome_to_text
from evosweep.core.problem import Problem
from evosweep.search.protocols import Genomes, Scorer

logger = logging.getLogger(__name__)
WAITING = "waiting"  # nobody has claimed it
RUNNING = "running"  # a process scores it
DONE = "done"  # its result is there
VOID = "void"  # its holder has lost it, or given it back
BEATS = 5  # signs of life during a lease
SHORTEST_PAUSE = 0.03  # seconds; a look at a database takes some milliseconds of work
LONGEST_PAUSE = 0.5
PAUSE_SHARE = 0.05
LONGEST_LEASE = 86400.0


@dataclass(frozen=True)
class Sharing:
    """Whether and how other processes (``evosweep worker``) may score parts of this search.

    Args:
        parts: How many parts each stage's candidates are cut into, at least as many as there are processes; null: this
            process scores alone.
        lease: Seconds without a sign of life after which what a worker holds is given to others.

    Raises:
        SettingError: A setting cannot be used.
    """

    parts: int | None = None
    lease: float = 20.0

    def __post_init__(self) -> None:
        if self.parts is not None:
            check_int("parts", self.parts, low=1)
        check_number("lease", self.lease, low=0, high=LONGEST_LEASE, exclusive=True)


@dataclass(frozen=True)
class Part:
    """A call of a scorer as JSON values.

    Attributes:
        call: Method of ``Scorer`` that scores: ``score``, ``losses`` or ``score_all``.
        arguments: Its arguments but for the genomes.
        genomes: Candidates, as ``genome_to_text`` writes them.
    """

    call: str
    arguments: Mapping[str, Any]
    genomes: tuple[str, ...]

    @property
    def key(self) -> str:
        """Digest of everything that the result follows from."""
        return digest(self.dump(), length=32)

    def dump(self) -> dict[str, Any]:
        """Return the part as JSON values."""
        return {"call": self.call, "arguments": dict(self.arguments), "genomes": list(self.genomes)}

    @classmethod
    def load(cls, value: Mapping[str, Any]) -> "Part":
        """Return the part that ``dump`` gave."""
        return cls(value["call"], value["arguments"], tuple(value["genomes"]))

    def run(self, scorer: Scorer, problem: Problem) -> npt.NDArray[Any]:
        """Return what a scorer gives for this part, a row for each genome."""
        genomes = np.stack([genome_from_text(problem, text) for text in self.genomes])
        arguments = dict(self.arguments)
        if self.call == "score":
            return scorer.score(genomes, **arguments)
        if self.call == "score_all":
            return scorer.score_all(genomes, **arguments)
        if self.call != "losses":
            raise ValueError(f"a part asks for {self.call!r}, which no scorer has")
        return scorer.losses(genomes, **{**arguments, "windows": slice(*arguments["windows"])})


def cut(call: str, arguments: Mapping[str, Any], genomes: Genomes, *, problem: Problem, parts: int) -> list[Part]:
    """Return a call of a scorer as parts of almost equally many genomes, in their order.

    Args:
        call: As in ``Part``.
        arguments: As in ``Part``.
        genomes: Level indices, shape (genomes, units).
        problem: Writes them as text.
        parts: At most how many; none is empty.
    """
    texts = [genome_to_text(problem, genome) for genome in genomes]
    bounds = np.linspace(0, len(texts), min(parts, len(texts)) + 1).round().astype(int)
    return [Part(call, arguments, tuple(texts[start:stop])) for start, stop in itertools.pairwise(bounds)]


def dump_array(values: npt.NDArray[Any]) -> dict[str, Any]:
    """Return numbers as JSON values, exact to the bit."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return {
        "dtype": little.dtype.str,
        "shape": list(values.shape),
        "data": base64.b64encode(little.tobytes()).decode("ascii"),
    }


def load_array(value: Mapping[str, Any]) -> npt.NDArray[Any]:
    """Return the numbers that ``dump_array`` gave."""
    dtype = np.dtype(value["dtype"])
    flat = np.frombuffer(base64.b64decode(value["data"]), dtype=dtype)
    return flat.reshape(value["shape"]).astype(dtype.newbyteorder("="))


@dataclass(frozen=True)
class Entry:
    """A published part as the queue has it.

    Attributes:
        ticket: Its number in the queue.
        part: What is to be scored.
        state: ``waiting``, ``running``, ``done`` or ``void``.
        holder: Who has claimed it; empty before the holder has said so.
        beat: The holder's last sign of life, a number that rises.
        result: Of a part that is done, as ``dump_array`` wrote it.
        reason: Why it is void.
    """

    ticket: int
    part: Part
    state: str
    holder: str = ""
    beat: int = 0
    result: Mapping[str, Any] | None = None
    reason: str = ""


class WorkQueue(Protocol):
    """Parts that are to be scored, in a storage that all processes reach.

    ``claim``, ``finish`` and ``void`` are atomic: of several that claim a part one gets it, and a part that is done or
    void stays so.
    """

    def publish(self, part: Part) -> int:
        """Add a part that waits; return its ticket."""

    def unfinished(self) -> list[Entry]:
        """Return the entries that wait, run or have just been done, in the order in which they were published."""

    def known(self) -> list[Entry]:
        """Return all entries."""

    def entry(self, ticket: int) -> Entry:
        """Return one entry."""

    def claim(self, ticket: int) -> bool:
        """Take a part that waits; return False if another process has it."""

    def beat(self, ticket: int, holder: str, beat: int) -> bool:
        """Write a sign of life, the holder's name at first; return False if the part is not the caller's any more.

        Args:
            ticket: Of the part.
            holder: Name of the process that scores it.
            beat: 0, 1, 2 ...
        """

    def finish(self, ticket: int, result: Mapping[str, Any]) -> bool:
        """Deliver a result; return False if it comes too late, and is dropped."""

    def void(self, ticket: int, reason: str) -> bool:
        """End a claim without a result; return False if the part is done or void already."""

    def workers(self) -> list[str]:
        """Return the names of the workers that have joined and not left."""

    def closed(self) -> bool:
        """Return whether the search is over."""


@dataclass
class Leases:
    """Finds claims whose holders show no sign of life, by the clock of the process that asks.

    Args:
        seconds: Length of a lease.
    """

    seconds: float
    _seen: dict[int, tuple[int, float]] = field(default_factory=dict)  # last beat of a ticket, and when it was new

    def expired(self, running: Iterable[Entry], *, now: float) -> list[Entry]:
        """Return the entries whose last sign of life was new a lease ago or earlier.

        Args:
            running: All entries that are claimed by others.
            now: Seconds of a clock that never goes back.
        """
        before = self._seen
        self._seen = {}
        late = []
        for entry in running:
            beat, since = before.get(entry.ticket, (-1, now))
            if entry.beat != beat:
                since = now
            self._seen[entry.ticket] = (entry.beat, since)
            if now - since >= self.seconds:
                late.append(entry)
        return late


@contextmanager
def beating(beat: Callable[[int], bool], *, every: float) -> Iterator[None]:
    """Call ``beat`` at once and then periodically, from a thread of its own, while the context lasts: a heartbeat.

    Args:
        beat: Called with the number of the call, from 0; once it returns False it is not called again. What it
            raises is logged, and the next call is made all the same.
        every: Seconds between two calls.
    """
    over = threading.Event()

    def work() -> None:
        for count in itertools.count():
            try:
                if not beat(count):
                    return
            except Exception:  # a storage that is away now may answer the next beat
                logger.debug("a sign of life was not written", exc_info=True)
            if over.wait(every):
                return

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@dataclass
class Pause:
    """The pauses between polls of a work queue that has nothing to do: they grow the longer it is so.

    Attributes:
        began: When polling began to find nothing, on the clock of ``time.monotonic``, seconds.
    """

    began: float = field(default_factory=time.monotonic)

    def wait(self) -> None:
        """Sleep for PAUSE_SHARE of the time since ``began``, from SHORTEST_PAUSE to LONGEST_PAUSE seconds."""
        time.sleep(min(LONGEST_PAUSE, max(SHORTEST_PAUSE, PAUSE_SHARE * (time.monotonic() - self.began))))


def joined(results: Sequence[Mapping[str, Any]]) -> npt.NDArray[Any]:
    """Return the arrays of results that workers sent, in the order given, as one array joined along its rows."""
    return np.concatenate([load_array(result) for result in results])
