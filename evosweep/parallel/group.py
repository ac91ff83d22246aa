"""Operations of a group of processes, each a loop over short sleeps, so that signals arrive."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from evosweep.core import rendezvous
from evosweep.core.errors import EvosweepError

SPIN = 0.05  # seconds of waiting without a pause
PAUSE = 5e-4  # seconds between two looks after that
LOOK = 1.0  # seconds between two looks at whether another process failed
LEFT = "left"  # key of the rendezvous' store: how many have seen it
FAILED = "failed"  # key of the rendezvous' store: why a process failed; the leader prints its reason itself


class RanksError(EvosweepError):
    """Another process failed, left or did not answer in time."""


class Over(Exception):
    """Raised in a process that follows, when the command is over and its leader has reported why."""


@dataclass
class Group:
    """The processes that this one belongs to.

    Attributes:
        rank: Of this process.
        size: How many there are.
        timeout: Seconds that one waits for another.
        store: The rendezvous' keys and values.
        control: Group that orders and answers go through, on the CPU.
        leads: Whether this process gives orders.
        owed: Whether the others have not answered the last order.
        lost: Whether the processes are out of step, so that no order is possible any more.
    """

    rank: int
    size: int
    timeout: float
    store: Any
    control: Any = None
    leads: bool = False
    owed: bool = False
    lost: bool = False


def broadcast(group: Group, tensor: torch.Tensor, *, limit: float | None = None) -> None:
    """Replace a tensor, in place, by the leader's.

    Args:
        group: The processes.
        tensor: On the CPU.
        limit: Seconds; None: as long as the others are there.
    """
    wait(group, distributed.broadcast(tensor, src=0, group=group.control, async_op=True), limit=limit)


def padded(group: Group, message: torch.Tensor, *, limit: float | None) -> torch.Tensor:
    """Return a message with zeros behind it, as long as the longest that a process has.

    Args:
        group: The processes.
        message: Bytes, uint8.
        limit: Seconds; None: as long as the others are there.
    """
    length = torch.tensor([len(message)])
    wait(group, distributed.all_reduce(length, distributed.ReduceOp.MAX, group.control, async_op=True), limit=limit)
    longer = torch.zeros(int(length), dtype=torch.uint8)
    longer[: len(message)] = message
    return longer


def gathered(group: Group, message: torch.Tensor, *, limit: float | None = None) -> list[torch.Tensor]:
    """Return the bytes that every process gave, by rank, in the leader; nothing in the others.

    Args:
        group: The processes.
        message: Bytes of this one, uint8.
        limit: Seconds; None: as long as the others are there.
    """
    mine = padded(group, message, limit=limit)
    found = [torch.empty_like(mine) for _ in range(group.size)] if group.rank == 0 else None
    wait(group, distributed.gather(mine, found, dst=0, group=group.control, async_op=True), limit=limit)
    return found or []


def wait(group: Group, work: Any, *, limit: float | None = None, watch: Sequence[int] = (0,)) -> None:
    """Wait for an operation of several processes, open to signals and to what happens to the others.

    Args:
        group: The processes.
        work: The operation.
        limit: Seconds; None: as long as the others are there.
        watch: Processes whose failure ends the wait; one that answers orders says so in its answer.

    Raises:
        RanksError: Another process failed or left, or the time is over.
        Over: The leader has failed and said why.
    """
    began = time.monotonic()
    looked = began
    try:
        while not work.is_completed():
            now = time.monotonic()
            if now - looked > LOOK:
                looked = now
                _check_others(group, watch)
                if limit is not None and now - began > limit:
                    raise RanksError(f"another process did not answer within {limit:g} s ({rendezvous.TIMEOUT})")
            time.sleep(0 if now - began < SPIN else PAUSE)
        work.wait()
    except (RuntimeError, ValueError) as error:  # of torch: the connection is gone
        _check_others(group, range(group.size))
        raise RanksError(
            f"another process of the {group.size} has ended before its work was done (killed, or out of memory); "
            "start the same command again, with resume=auto to go on"
        ) from error


def _check_others(group: Group, others: Sequence[int]) -> None:
    """Raise the error of another process that failed; Over where the leader reports it."""
    try:
        for other in others:
            if other != group.rank and group.store.check([f"{FAILED}/{other}"]):
                if other == 0 or group.rank:
                    group.store.add(LEFT, 1)
                    raise Over
                raise RanksError(f"process {other} of {group.size}: {group.store.get(f'{FAILED}/{other}').decode()}")
    except (RuntimeError, ValueError):
        return  # the store went with the process that kept it


@contextmanager
def in_step(group: Group) -> Iterator[None]:
    """Note that the processes are out of step if an operation of all of them is cut; end those that follow."""
    try:
        yield
    except BaseException:
        group.lost = True
        if group.leads:
            with suppress(RuntimeError):
                group.store.set(f"{FAILED}/0", "")
        raise
