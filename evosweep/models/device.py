"""Picks a device, measures its free memory, and copies blocks to it one at a time."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import psutil
import torch
from torch import nn

from evosweep import parallel
from evosweep.core.errors import SettingError


def pick_device(setting: str, device: str) -> torch.device:
    """Return the torch device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` names.

    Args:
        setting: Name of the argument, for the error.
        device: Its value.

    Raises:
        SettingError: Another kind of device, or one that this machine does not have.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    several = parallel.on_this_host() > 1
    if several and count and device not in ("auto", "cpu", "cuda"):
        hint = "each of several processes takes the device of its LOCAL_RANK"
        raise SettingError(setting, allowed=["auto", "cpu", "cuda"], got=device, hint=hint)
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if count else torch.device("cpu")
    allowed = ["auto", "cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
    if device not in allowed:
        missing = isinstance(device, str) and device.startswith("cuda") and not count
        hint = "there is no CUDA device here" if missing else ""
        raise SettingError(setting, allowed=allowed, got=device, hint=hint)
    return torch.device(device)


def moved(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return an array as a tensor on a device; the copy to a GPU does not wait for the work queued before it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a device's memory that are free, torch's own unused reserve included.

    Processes that share the work on one host get equal parts of its memory.
    """
    if device.type != "cuda":
        return int(psutil.virtual_memory().available) // parallel.on_this_host()
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + held)


@contextmanager
def tf32(*, allowed: bool) -> Iterator[None]:
    """Allow or forbid CUDA to multiply fp32 matrices in TF32 while the context lasts."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def let_visit(blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Keep blocks in host memory, and copy each to ``device`` only while it runs.

    The weight of a module whose forward is replaced (by one with a compressed weight) is not copied, as it is not
    used. For a CUDA device the host memory is page-locked, so that copies run beside computation.

    Args:
        blocks: The decoder's blocks; hooks are registered on them.
        device: Where they run.
    """
    for block in blocks:
        block.to("cpu")
        if device.type == "cuda":
            for tensor in [*block.parameters(), *block.buffers()]:
                tensor.data = page_locked(tensor.data, owner=block)
        block.register_forward_pre_hook(_Visit(device))
        block.register_forward_hook(_leave, always_call=True)


def page_locked(tensor: torch.Tensor, *, owner: object) -> torch.Tensor:
    """Return a copy of a tensor in page-locked host memory of its own size, or in plain memory if that is refused.

    ``Tensor.pin_memory`` takes the next power of two: 43 GB for the 26 GB of a model in Llama-13B's shape.

    Args:
        tensor: On the CPU; it may be a part of a file, which could not be locked itself.
        owner: The memory is kept and stays locked until this object is gone.
    """
    copy = tensor.clone()
    runtime = torch.cuda.cudart()
    if copy.nbytes and not runtime.cudaHostRegister(copy.data_ptr(), copy.nbytes, 0).value:
        weakref.finalize(owner, _unlock, copy)
    return copy


def _unlock(tensor: torch.Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())


class _Visit:
    """Forward pre-hook that copies a block's weights to a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, block: nn.Module, args: Any) -> None:
        del args
        homes = [
            (tensor, tensor.data)
            for module in block.modules()
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if tensor.dim() < 2 or _uses_its_weights(module)
        ]
        vars(block)["_homes"] = homes
        for tensor, home in homes:
            tensor.data = home.to(self.device, non_blocking=True)


def _uses_its_weights(module: nn.Module) -> bool:
    """Return whether a module's forward is its own, or a replacement that says that it uses the module's weights."""
    return getattr(vars(module)["forward"], "keeps_weights", False) if "forward" in vars(module) else True


def _leave(block: nn.Module, args: Any, output: Any) -> None:
    del args, output
    for tensor, home in vars(block).pop("_homes", ()):
        tensor.data = home
