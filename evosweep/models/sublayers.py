"""Attention and MLP of every block of a model, found by what their output does, not by their names.

A sub-block is a module inside a block whose output can be missing while the residual stream goes on. Three runs of the
block on a few tokens decide that: without the output of the module, with zeros in place of all its parameters, and with
noise in place of them while its output is missing. All three must agree: then nothing that counts as gone is used, and
a checkpoint with zeros computes what was scored. Modules that add the residual stream themselves (BLOOM's attention,
BERT's output) are cut behind their last linear layer instead.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from evosweep.models.device import moved
from evosweep.models.grouped_rows import among_running
from evosweep.models.probe import Call, Inspect
from evosweep.models.slots import Slot

CLOSE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest value of a block's output

Run = Callable[[], list[torch.Tensor]]


@dataclass(frozen=True)
class Sublayer:
    """A part of a block that can be missing.

    Attributes:
        name: Path of the module; ``...fc1+fc2`` for layers that are the block's own children.
        block: Index of the block.
        writer: Path of the module whose output is zero where it is missing.
        slots: Names of the slots in it.
        parameters: The parameters that nothing uses then; with zeros in them its output is zero.
        shared: Another name of one of them, where another part of the model has it too.
    """

    name: str
    block: int
    writer: str
    slots: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    shared: str = ""


@dataclass(frozen=True)
class Part:
    """A candidate: modules of a block, with the places where their output could be cut.

    Attributes:
        name: As for ``Sublayer``.
        modules: The modules by path.
        writers: Paths of modules, the first that fits is cut.
        slots: The slots in it.
    """

    name: str
    modules: dict[str, nn.Module]
    writers: tuple[str, ...]
    slots: tuple[Slot, ...]


def find_sublayers(
    model: nn.Module, *, path: str, slots: Sequence[Slot], probe: Callable[[Inspect], None]
) -> tuple[Sublayer, ...]:
    """Return the sub-blocks of all blocks, in the order in which they run.

    Args:
        model: The model in eval mode.
        path: Of its list of blocks.
        slots: All slots in them.
        probe: ``probe.probe_blocks`` of the model.
    """
    found: list[Sublayer] = []
    owners = parameter_names(model)

    def inspect(block: int, call: Call) -> None:
        name = f"{path}.{block}"
        parts = _parts(model.get_submodule(name), name, [slot for slot in slots if slot.block == block])
        tried = (_tried(part, block, model, call.run, owners) for part in _in_order(parts, call.run))
        found.extend(sublayer for sublayer in tried if sublayer is not None)

    probe(inspect)
    return tuple(sorted(found, key=lambda sublayer: sublayer.block))


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """Make the first tensor that a module returns zero while the context lasts."""
    handle = module.register_forward_hook(lambda _module, _args, output: with_first(output, torch.zeros_like))
    try:
        yield
    finally:
        handle.remove()


def with_first(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return what a module returned with its first tensor changed."""
    if isinstance(output, torch.Tensor):
        return change(output)
    changed = [change(output[0]), *output[1:]]
    return type(output)(*changed) if hasattr(output, "_fields") else type(output)(changed)  # a tuple with names


@contextmanager
def silenced_rows(module: nn.Module, gone: npt.NDArray[np.int64], rows: int) -> Iterator[None]:
    """Make the first tensor that a module returns zero for some rows of the population while the context lasts.

    Args:
        module: The module.
        gone: Indices of the rows that get zeros.
        rows: Number of rows; the batch holds equally many sequences a row.
    """

    def partly(output: torch.Tensor) -> torch.Tensor:
        here, count = among_running(gone, rows)
        return output.reshape(count, -1).index_fill(0, moved(here, output.device), 0).view(output.shape)

    handle = module.register_forward_hook(lambda _module, _args, output: with_first(output, partly))
    try:
        yield
    finally:
        handle.remove()


def zeros_in(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Return a context in which some parameters are zero; what they had is not copied."""
    return _other_values(parameters, torch.zeros_like)


def noise_in(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Return a context in which some parameters are random; what they had is not copied."""
    draws = torch.Generator().manual_seed(0)

    def noise(values: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(values).copy_(torch.randn(values.shape[-1:], generator=draws))  # the same in all rows

    return _other_values(parameters, noise)


@contextmanager
def _other_values(parameters: Iterable[nn.Parameter], make: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    homes = [(parameter, parameter.data) for parameter in parameters]
    for parameter, home in homes:
        parameter.data = make(home)
    try:
        yield
    finally:
        for parameter, home in homes:
            parameter.data = home


def _parts(block: nn.Module, path: str, slots: Sequence[Slot]) -> list[Part]:
    """Return the modules of a block with matrices in them; linear layers that are its own children are one part."""
    paths = {id(module): f"{path}.{name}" for name, module in block.named_modules()}
    children: dict[str, nn.Module] = {}
    for name, child in block.named_children():
        inner = child.named_children() if isinstance(child, nn.ModuleList) else [("", child)]
        children |= {f"{path}.{name}.{index}".rstrip("."): module for index, module in inner}
    own = [slot for slot in slots if slot.name in children]
    parts = []
    for name, child in children.items():
        if any(slot.name == name for slot in own) or not _owners(child):
            continue
        inside = tuple(slot for slot in slots if slot.name.startswith(f"{name}."))
        last = [paths[id(slot.module)] for slot in inside[-1:]]
        parts.append(Part(name, {name: child}, (name, *last), inside))
    if own:
        names = "+".join(slot.name.rpartition(".")[2] for slot in own)
        parts.append(Part(f"{path}.{names}", {slot.name: slot.module for slot in own}, (own[-1].name,), tuple(own)))
    return parts


def _in_order(parts: Sequence[Part], run: Run) -> list[Part]:
    """Return the parts that run, in the order in which they are done."""
    done: list[int] = []
    with ExitStack() as stack:
        for index, part in enumerate(parts):
            module = list(part.modules.values())[-1]
            stack.callback(module.register_forward_hook(lambda *_, index=index: done.append(index)).remove)
        run()
    return [parts[index] for index in dict.fromkeys(done)]


def _tried(part: Part, block: int, model: nn.Module, run: Run, owners: Mapping[int, Sequence[str]]) -> Sublayer | None:
    """Return a part as a sub-block, None where the block does not go on without it."""
    all_of_it = [parameter for module in part.modules.values() for parameter in module.parameters()]
    owning = [module for top in part.modules.values() for module in _owners(top)]
    matrices = list({id(p): p for module in owning for p in module.parameters(recurse=False)}.values())
    with zeros_in(matrices):
        expected = run()
    for writer, gone in product(part.writers, (all_of_it, matrices)):
        with zeros_in(gone):
            zeros = run()
        with silenced(model.get_submodule(writer)):
            missing = run()
            with noise_in(gone):
                noisy = run()
        if all(_same(values, expected) for values in (zeros, missing, noisy)):
            return Sublayer(
                name=part.name,
                block=block,
                writer=writer,
                slots=tuple(slot.name for slot in part.slots),
                parameters=tuple(gone),
                shared=_elsewhere(part, gone, owners),
            )
    return None


def _elsewhere(part: Part, parameters: Sequence[nn.Parameter], owners: Mapping[int, Sequence[str]]) -> str:
    """Return the name of one of these parameters outside of the part, nothing where they are its own."""
    names = (name for parameter in parameters for name in owners[id(parameter)])
    return next((name for name in names if not name.startswith(tuple(f"{path}." for path in part.modules))), "")


def parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """Return all names of every parameter, by its id."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _owners(top: nn.Module) -> list[nn.Module]:
    """Return the modules inside of one, itself included, that have a parameter of two dimensions or more."""
    return [module for module in top.modules() if any(p.dim() > 1 for p in module.parameters(recurse=False))]


def _same(values: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Return whether what a block returned is the same, up to rounding."""
    pairs = zip(values, expected, strict=False)
    return len(values) == len(expected) and all(_close(value, wanted) for value, wanted in pairs)


def _close(value: torch.Tensor, wanted: torch.Tensor) -> bool:
    bound = CLOSE[wanted.dtype] * max(float(wanted.abs().max()), 1e-6)
    return value.shape == wanted.shape and bool(((value - wanted).abs() <= bound).all())
