"""Finds which layers read and write the residual stream by running the model; no list of model types is needed.

A layer whose input is the output of a norm reads the stream through that norm; another one with as many outputs as the
stream is wide writes to it; so do embeddings of that width. ``rotate`` compares the logits before and after, so a model
that is wired in another way is refused, not broken.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from evosweep.core.errors import ModelError
from evosweep.core.seeds import generator
from evosweep.models.blocks import find_blocks
from evosweep.models.slots import LinearSlot, slot_kind
from evosweep.models.verify import check_tokens

PROBE_ROWS = 4
PROBE_MEAN = 10.0
PROBE_SPREAD = 20.0


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream.

    Attributes:
        name: Path in the model.
        module: The norm.
        gain: What it multiplies with, shape (hidden,), in float64.
        bias: What it adds, shape (hidden,), in float64.
        offset: 1 where the module multiplies with ``1 + weight``, else 0.
        centers: Whether it subtracts the mean first, as LayerNorm does.
        readers: The layers that are given its output.
        after: Whether it normalizes the output of a layer on the way into the stream.
    """

    name: str
    module: nn.Module
    gain: torch.Tensor
    bias: torch.Tensor
    offset: float
    centers: bool
    readers: tuple[LinearSlot, ...]
    after: bool


@dataclass(frozen=True)
class Wiring:
    """What reads and writes the residual stream.

    Attributes:
        hidden: Width of the stream.
        embedded: Width of the input embedding.
        norms: Its norms, in the order in which they run.
        writers: The layers whose output is added to it.
        embeddings: The embeddings of its width, positions included.
        head: The output layer.
    """

    hidden: int
    embedded: int
    norms: tuple[Norm, ...]
    writers: tuple[LinearSlot, ...]
    embeddings: tuple[nn.Embedding, ...]
    head: LinearSlot

    @property
    def centers(self) -> bool:
        """Whether its norms subtract the mean."""
        return any(norm.centers for norm in self.norms)

    def check(self, family: str) -> None:
        """Raise ModelError, naming the family and what is in the way, where gains cannot be folded."""
        reason = self._obstacle()
        if reason:
            raise ModelError(
                f"norms of {family} cannot be folded, which rotating its residual stream needs: {reason}; "
                "transform.residual=false rotates values alone"
            )

    def _obstacle(self) -> str:
        if self.embedded != self.hidden:
            return f"its embedding is {self.embedded} wide and its blocks {self.hidden}, with a projection in between"
        for norm in self.norms:
            uneven = bool((norm.gain != norm.gain[0]).any()) or bool(norm.bias.any())
            if norm.after and uneven:
                return f"{norm.name} normalizes what a layer adds to the stream, its gain acts on the stream itself"
            if not norm.after and not norm.readers:
                return f"what reads the output of {norm.name} is no linear layer that is known here"
        if not any(norm.readers for norm in self.norms):
            return "it has none"
        return "some subtract the mean, others do not" if len({norm.centers for norm in self.norms}) > 1 else ""


@dataclass(frozen=True)
class _Call:
    """What a module without children was given and returned; the tensors are kept, so that addresses stay unique."""

    name: str
    module: nn.Module
    given: torch.Tensor
    returned: torch.Tensor


def find_wiring(model: nn.Module) -> Wiring:
    """Return what reads and writes the residual stream of a causal language model."""
    block_path, blocks = find_blocks(model)
    calls = _calls(model)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    hidden = _width(calls, blocks, default=int(embedding.weight.shape[1]))
    slots = _slots(calls, block_path)
    norms = [call for call in calls if _is_norm(call, hidden)]
    reading = {slot.name for slot, given in slots if any(_same(given.given, norm.returned) for norm in norms)}
    writing = [
        (slot, given)
        for slot, given in slots
        if slot.name not in reading and slot.shape[0] == hidden and _reads_alone(given, slots)
    ]
    writers = tuple(slot for slot, _ in writing)
    written = [given for _, given in writing]
    inner = [given for slot, given in slots if slot not in writers]  # norms of queries and keys read these
    head = LinearSlot(name=_path(model, output), block=-1, module=output, group="")
    found = []
    for call in norms:
        if any(_same(call.given, other.returned) for other in inner):
            continue
        readers = tuple(slot for slot, given in slots if _same(given.given, call.returned))
        if call is norms[-1] and not readers:
            readers = (head,)
        after = not readers and any(_same(call.given, other.returned) for other in written)
        found.append(_norm(call, readers=readers, after=after))
    inside = {id(module) for module in blocks.modules()}
    embeddings = tuple(
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight.shape[1] == hidden and id(module) not in inside
    )
    return Wiring(
        hidden=hidden,
        embedded=int(embedding.weight.shape[1]),
        norms=tuple(found),
        writers=writers,
        embeddings=embeddings,
        head=head,
    )


def _reads_alone(call: _Call, slots: Sequence[tuple[LinearSlot, _Call]]) -> bool:
    """Return whether no other layer is given the same input; queries, keys and values share theirs."""
    return sum(_same(call.given, other.given) for _, other in slots) == 1


def _calls(model: nn.Module) -> list[_Call]:
    """Return the calls of all modules without children that take and return one tensor, in order."""
    calls: list[_Call] = []

    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            if not any(True for _ in module.children()):
                stack.callback(module.register_forward_hook(partial(_record, calls, name)).remove)
        device = next(model.parameters()).device
        model(input_ids=check_tokens(model, device), use_cache=False)
    return calls


def _record(calls: list[_Call], name: str, module: nn.Module, *call: Any) -> None:
    """Add what a forward hook is given, (arguments, output), to the calls."""
    args, output = call
    if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
        calls.append(_Call(name, module, args[0], output))


def _slots(calls: Sequence[_Call], block_path: str) -> list[tuple[LinearSlot, _Call]]:
    """Return the linear layers of the blocks with their first calls."""
    found: dict[str, tuple[LinearSlot, _Call]] = {}
    for call in calls:
        kind = slot_kind(call.module)
        if kind is not None and call.name.startswith(block_path + ".") and call.name not in found:
            block = int(call.name.removeprefix(block_path + ".").split(".")[0])
            found[call.name] = (kind(name=call.name, block=block, module=call.module, group=call.name), call)
    return list(found.values())


def _width(calls: Sequence[_Call], blocks: nn.ModuleList, *, default: int) -> int:
    """Return the width of the stream: that of what the first layer of the first block, a norm or not, is given."""
    inside = {id(module) for module in blocks[0].modules()}
    given = (call.given for call in calls if id(call.module) in inside and call.given.dim() == 3)
    return next((int(tensor.shape[-1]) for tensor in given), default)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are the same memory, perhaps in another shape."""
    return one is other or (one.data_ptr() == other.data_ptr() and one.numel() == other.numel())


def _is_norm(call: _Call, hidden: int) -> bool:
    shapes = call.given.shape == call.returned.shape and call.given.shape[-1] == hidden
    return shapes and slot_kind(call.module) is None and _form(call) is not None


def _form(call: _Call) -> tuple[bool, float] | None:
    """Return whether the module subtracts the mean, and 1 where its gain is 1 + weight; None where it is no norm.

    It is tried on numbers so large that what it adds to the variance does not matter.
    """
    sample = call.given if getattr(call.module, "weight", None) is None else call.module.weight
    assert isinstance(sample, torch.Tensor)
    rows = generator(0, "norm check").normal(PROBE_MEAN, PROBE_SPREAD, (PROBE_ROWS, call.given.shape[-1]))
    values = torch.from_numpy(rows).to(sample.device)
    try:
        output = call.module(values.to(sample.dtype))
    except (RuntimeError, TypeError, ValueError):
        return None
    weight = _weight(call.module, values)
    bias = _bias(call.module, values)
    for centers in (False, True):
        base = values - values.mean(-1, keepdim=True) if centers else values
        normed = base * torch.rsqrt(base.pow(2).mean(-1, keepdim=True))
        for offset in (0.0, 1.0):
            expected = normed * (offset + weight) + bias
            if torch.allclose(expected, output.double(), rtol=0, atol=1e-4 * float(expected.abs().max())):
                return centers, offset
    return None


def _weight(module: nn.Module, sample: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.shape != sample.shape[-1:]:
        return torch.ones(sample.shape[-1], dtype=torch.float64, device=sample.device)
    return weight.detach().to(sample.device, torch.float64)


def _bias(module: nn.Module, sample: torch.Tensor) -> torch.Tensor:
    bias = getattr(module, "bias", None)
    if not isinstance(bias, torch.Tensor):
        return torch.zeros(sample.shape[-1], dtype=torch.float64, device=sample.device)
    return bias.detach().to(sample.device, torch.float64)


def _norm(call: _Call, *, readers: tuple[LinearSlot, ...], after: bool) -> Norm:
    form = _form(call)
    assert form is not None  # it was found by its form
    centers, offset = form
    return Norm(
        name=call.name,
        module=call.module,
        gain=_weight(call.module, call.given) + offset,
        bias=_bias(call.module, call.given),
        offset=offset,
        centers=centers,
        readers=readers,
        after=after,
    )


def _path(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
