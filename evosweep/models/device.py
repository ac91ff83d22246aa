"""Where models run: which device, how much of it is free, and blocks that only visit it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import psutil
import torch
from torch import nn

from evosweep.core.errors import SettingError


def pick_device(setting: str, device: str) -> torch.device:
    """Return the torch device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means here."""
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise SettingError(setting, allowed=["auto", "cpu", "cuda", "cuda:0"], got=device) from error
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cpu" and chosen.index):
        raise SettingError(setting, allowed=["auto", "cpu", "cuda", "cuda:0"], got=device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise SettingError(setting, allowed="auto or cpu (there is no CUDA device here)", got=device)
    return chosen


def moved(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return an array as a tensor on a device; a GPU is not waited for, so that it always has work ahead of it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def free_bytes(device: torch.device) -> int:
    """Return how many bytes of a device's memory could still be taken; what torch holds without use counts as free."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + held)


@contextmanager
def tf32(*, allowed: bool) -> Iterator[None]:
    """Let CUDA multiply fp32 matrices in TF32, or not, for a while."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def let_visit(blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Keep blocks in host memory; each comes to ``device`` when it is called and leaves when it returns.

    A matrix under a stand-in forward (a compressed layer's, say) stays at home: nobody asks for it. Where ``device``
    is not the CPU, homes are page-locked, so that copying does not wait.
    """
    for block in blocks:
        block.to("cpu")
        if device.type == "cuda":
            for tensor in [*block.parameters(), *block.buffers()]:
                tensor.data = tensor.data.pin_memory()
        block.register_forward_pre_hook(_Visit(device))
        block.register_forward_hook(_leave, always_call=True)


class _Visit:
    """Forward pre-hook: brings a block's own weights to a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, block: nn.Module, args: Any) -> None:
        del args
        homes = [
            (tensor, tensor.data)
            for module in block.modules()
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if tensor.dim() < 2 or "forward" not in vars(module)
        ]
        vars(block)["_homes"] = homes
        for tensor, home in homes:
            tensor.data = home.to(self.device, non_blocking=True)


def _leave(block: nn.Module, args: Any, output: Any) -> None:
    del args, output
    for tensor, home in vars(block).pop("_homes", ()):
        tensor.data = home
