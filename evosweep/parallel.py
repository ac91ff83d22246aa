"""Calibration divided among processes: each runs its own token windows, and their measurements are summed.

Start with ``torchrun --nproc-per-node N -m evosweep ...``. The leader (rank 0) writes the level store and goes on to
search; the other processes help to build the store and end.
"""

import atexit
import os
from typing import Any

import torch
from torch import distributed

from evosweep.core.errors import StoreError


def join() -> None:
    """Join the process group if torchrun started this process; calling it again does nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Booleans are broadcast from the CPU, sums are taken where the model is.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        atexit.register(distributed.destroy_process_group)


def is_leader() -> bool:
    """Return whether this process writes files: rank 0 of a group, or the only process."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def shard_rows(rows: Any) -> Any:
    """Return the rows of an array that this process works on: every N-th one, of N processes.

    Raises:
        StoreError: There are fewer rows (token windows) than processes.
    """
    if not distributed.is_initialized():
        return rows
    count = distributed.get_world_size()
    if len(rows) < count:
        raise StoreError(
            f"tokens.calibration must be at least one window of tokens.seq_len a process, got {len(rows)} windows "
            f"for {count} processes"
        )
    return rows[distributed.get_rank() :: count]


def all_reduce_sum(*tensors: torch.Tensor) -> None:
    """Replace each tensor, in place, by its sum over all processes."""
    if distributed.is_initialized():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def all_reduce_max(tensor: torch.Tensor) -> None:
    """Replace a tensor, in place, by its largest values over all processes."""
    if distributed.is_initialized():
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)


def broadcast_bool(value: bool) -> bool:
    """Return the leader's ``value`` in every process."""
    if not distributed.is_initialized():
        return value
    answer = torch.tensor([int(value)])
    distributed.broadcast(answer, src=0)
    return bool(answer)
