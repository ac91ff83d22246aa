"""Calibration shared out among processes: each runs its own windows, and what they measure is added up.

Start with ``torchrun --nproc-per-node N -m evosweep ...``. The first process writes the store and goes on to search;
the others help to build the store and end.
"""

import atexit
import os
from typing import Any

import torch
from torch import distributed

from evosweep.core.errors import StoreError


def join() -> None:
    """Join the group that torchrun started this process for, if it did, once."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Agreements are Python objects on the CPU, sums are where the model is.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        atexit.register(distributed.destroy_process_group)


def leads() -> bool:
    """Return whether this process writes; alone, it does."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def mine(windows: Any) -> Any:
    """Return this process's share of token windows, every so-manieth row.

    Raises:
        StoreError: There are fewer windows than processes.
    """
    if not distributed.is_initialized():
        return windows
    count = distributed.get_world_size()
    if len(windows) < count:
        raise StoreError(
            f"tokens.calibration must be at least one window of tokens.seq_len a process, got {len(windows)} windows "
            f"for {count} processes"
        )
    return windows[distributed.get_rank() :: count]


def add_up(*tensors: torch.Tensor) -> None:
    """Replace tensors by their sums over all processes."""
    if distributed.is_initialized():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def agree(*, leader: bool) -> bool:
    """Return the first process's answer in every process."""
    if not distributed.is_initialized():
        return leader
    answer = torch.tensor([int(leader)])
    distributed.broadcast(answer, src=0)
    return bool(answer)
