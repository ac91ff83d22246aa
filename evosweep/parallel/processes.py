"""Processes of one command that share its work: the leader orders and writes, the others compute what it asks for.

Start with ``torchrun --nproc-per-node N -m evosweep ...``. The leader (rank 0) alone reads settings, searches, and
writes files, runs and studies. It broadcasts orders (build the store together, score these genomes ...); the others
answer one after the other until it leaves. So nothing but the leader decides what happens next: not a clock, a signal,
a cached file or a sampler's storage that another process would see at another moment.

Every wait is a loop over short sleeps, so that signals arrive; it ends when another process has failed or left.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from evosweep.core import rendezvous
from evosweep.core.errors import EvosweepError, StoreError
from evosweep.parallel.group import (
    FAILED,
    LEFT,
    PAUSE,
    Group,
    Over,
    RanksError,
    broadcast,
    gathered,
    in_step,
    padded,
    wait,
)
from evosweep.parallel.packing import Message, Tensors, packed, unpacked

END = "end"
FAREWELL = 3.0  # seconds that a leader waits until the others have seen that it failed
Handler = Callable[[Mapping[str, Any], Tensors], Message | None]


_groups: list[Group] = []  # none, or the one


def join() -> None:
    """Join the processes that torchrun started with this one; calling it again does nothing.

    Raises:
        EvosweepError: The environment asks for several processes and does not say where they meet, or they do not
            meet in time.
    """
    size = rendezvous.processes()
    if size == 1 or _groups:
        return
    where = rendezvous.meeting_point()
    timeout = rendezvous.timeout()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rendezvous.local_rank(torch.cuda.device_count()))
    limit = timedelta(seconds=timeout)
    try:
        store, rank, size = next(iter(torch.distributed.rendezvous("env://", timeout=limit)))  # type: ignore[attr-defined]
        store.set_timeout(limit)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",  # sums are taken where the model is
            store=distributed.PrefixStore("group", store),  # type: ignore[attr-defined]
            rank=rank,
            world_size=size,
            timeout=limit,
        )
        control = distributed.new_group(backend="gloo", timeout=timedelta(seconds=rendezvous.LONGEST))
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EvosweepError(
            f"the {size} processes did not meet at {where} within {timeout:g} s ({rendezvous.TIMEOUT}): {reason}; "
            f"{rendezvous.HOW}"
        ) from error
    mine = distributed.PrefixStore("evosweep", store)  # type: ignore[attr-defined]
    _groups.append(Group(rank, size, timeout, mine, control))


def is_leader() -> bool:
    """Return whether this process writes files: rank 0 of a group, or the only process."""
    return not _groups or _groups[0].rank == 0


def count() -> int:
    """Return how many processes share the work."""
    return _groups[0].size if _groups else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return _groups[0].rank if _groups else 0


def on_this_host() -> int:
    """Return how many of the processes run on this host, and so share its memory."""
    return rendezvous.on_this_host(count())


def lead() -> None:
    """Let this process give orders from now on, if there are others; they must ``follow``."""
    for group in _groups:
        group.leads = group.rank == 0


def leads() -> bool:
    """Return whether there are other processes that wait for this one's orders."""
    return bool(_groups) and _groups[0].leads


def ask(name: str, facts: Mapping[str, Any] | None = None, tensors: Tensors | None = None) -> None:
    """Order something of all other processes, which answer it; the answers to an earlier order are waited for first.

    Args:
        name: Of the handler that does it.
        facts: What it should know, as JSON.
        tensors: As ``facts``.

    Raises:
        RanksError: Another process failed or left.
    """
    answers()
    group = _groups[0]
    if group.lost:
        raise RanksError("the processes are out of step since an earlier error; start the command again")
    group.owed = name != END
    message = packed({"order": name, **(facts or {})}, tensors or {})
    with in_step(group):
        broadcast(group, torch.tensor([len(message)]), limit=group.timeout)
        broadcast(group, message, limit=group.timeout)


def answers() -> list[Message]:
    """Return what the other processes answered to the last order, by rank from 1; none where all answers were read.

    Raises:
        RanksError: Another process failed, left or did not answer in time.
    """
    group = _groups[0]
    if not group.owed:
        return []
    with in_step(group):
        found = [unpacked(message) for message in gathered(group, packed({}, {}), limit=group.timeout)[1:]]
    group.owed = False
    for other, (facts, _) in enumerate(found, start=1):
        if "error" in facts:
            raise RanksError(f"process {other} of {group.size}: {facts['error']}")
    return found


@contextmanager
def asked(name: str, facts: Mapping[str, Any] | None = None, tensors: Tensors | None = None) -> Iterator[list[Message]]:
    """Order something of the others while this process does the same; yield a list that holds their answers at the end.

    An error of this process itself comes first.

    Args:
        name: As for ``ask``, and so are the others.
        facts: As JSON.
        tensors: By name.
    """
    found: list[Message] = []
    ask(name, facts, tensors)
    try:
        yield found
    except Exception:
        with suppress(RanksError):
            answers()  # so that the processes stay in step
        raise
    found += answers()


@contextmanager
def together(name: str) -> Iterator[None]:
    """Order something in which this process takes part with collective operations, while the context lasts."""
    if not leads():
        yield
        return
    ask(name)
    with in_step(_groups[0]):  # else the others may wait in an operation that this process never comes to
        yield
    answers()


def follow(handlers: Mapping[str, Handler]) -> None:
    """Answer the leader's orders, each by the handler of its name, until the command is over.

    Raises:
        RanksError: The leader is gone and left no reason.
    """
    group = _groups[0]
    with suppress(Over):
        while True:
            length = torch.zeros(1, dtype=torch.int64)
            broadcast(group, length)
            message = torch.empty(int(length), dtype=torch.uint8)
            broadcast(group, message)
            facts, tensors = unpacked(message)
            if facts["order"] == END:
                return
            gathered(group, packed(*_answer(group, handlers[facts["order"]], facts, tensors)))
            group.store.delete_key(f"{FAILED}/{group.rank}")  # the leader knows


def _answer(group: Group, handler: Handler, facts: Mapping[str, Any], tensors: Tensors) -> Message:
    """Return what a handler answers; an error of it is the answer, and ends operations that others wait in."""
    try:
        return handler(facts, tensors) or ({}, {})
    except (Over, RanksError):
        raise
    except Exception as error:
        text = str(error) if isinstance(error, EvosweepError) else f"{type(error).__name__}: {error}"
        group.store.set(f"{FAILED}/{group.rank}", " ".join(text.split()))
        return {"error": text}, {}


def leave() -> None:
    """Leave the group of processes; the leader first lets the others know that the command is over."""
    if not _groups:
        return
    group = _groups[0]
    if group.leads:
        with suppress(Exception):
            if not group.owed and not group.lost:
                ask(END)
            else:
                group.store.set(f"{FAILED}/0", "")
                deadline = time.monotonic() + FAREWELL  # the store may go with this process
                while group.store.add(LEFT, 0) < group.size - 1 and time.monotonic() < deadline:
                    time.sleep(PAUSE)
    _groups.clear()
    if not group.lost:
        with suppress(Exception):
            distributed.destroy_process_group()


def shard_rows(rows: Any) -> Any:
    """Return the rows of an array that this process works on: every N-th one, of N processes.

    Raises:
        StoreError: There are fewer rows (token windows) than processes.
    """
    if count() == 1:
        return rows
    if len(rows) < count():
        raise StoreError(
            f"tokens.calibration must be at least one window of tokens.seq_len a process, got {len(rows)} windows "
            f"for {count()} processes"
        )
    return rows[rank() :: count()]


def all_reduce_sum(*tensors: torch.Tensor) -> None:
    """Replace each tensor, in place, by its sum over all processes."""
    _reduce(tensors, distributed.ReduceOp.SUM)


def all_reduce_max(tensor: torch.Tensor) -> None:
    """Replace a tensor, in place, by its largest values over all processes."""
    _reduce([tensor], distributed.ReduceOp.MAX)


def _reduce(tensors: Sequence[torch.Tensor], operation: Any) -> None:
    for group in _groups:
        with in_step(group):
            for tensor in tensors:
                work = distributed.all_reduce(tensor, op=operation, async_op=True)
                wait(group, work, limit=group.timeout, watch=range(group.size))


def gather(facts: Mapping[str, Any], tensors: Tensors) -> list[Message]:
    """Return what every process gave, by rank, in the leader; nothing in the others."""
    if not _groups:
        return [(dict(facts), dict(tensors))]
    group = _groups[0]
    with in_step(group):
        return [unpacked(message) for message in gathered(group, packed(facts, tensors), limit=group.timeout)]


def gather_everywhere(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return the tensors of all processes, on the CPU where there are several, in every process; names are unique."""
    if not _groups:
        return dict(tensors)
    group = _groups[0]
    with in_step(group):
        mine = padded(group, packed({}, tensors), limit=group.timeout)
        found = [torch.empty_like(mine) for _ in range(group.size)]
        work = distributed.all_gather(found, mine, group=group.control, async_op=True)
        wait(group, work, limit=group.timeout, watch=range(group.size))
    return {name: tensor for message in found for name, tensor in unpacked(message)[1].items()}


def broadcast_bool(value: bool) -> bool:
    """Return the leader's ``value`` in every process."""
    answer = torch.tensor([int(value)])
    for group in _groups:
        with in_step(group):
            broadcast(group, answer)
    return bool(answer)
