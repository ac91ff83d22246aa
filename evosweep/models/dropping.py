"""Dropping of attention and MLP sub-blocks, blocks and pairs of blocks: the units, and their effect on the model.

Everything about it is here: which modules a granularity allows to drop (``Drop.options``), how much each matters
(``influence``), how rows of a population run without one (``silenced_rows``, and ``DropEffect.whole`` blocks are not
run at all), and what a model on disk looks like without them (``removed``, ``dropped_parameters``).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from evosweep.core.checks import check_choice, check_int
from evosweep.core.errors import SettingError
from evosweep.models.anatomy import Anatomy
from evosweep.models.device import moved
from evosweep.models.patch import replaced_forward
from evosweep.models.slots import Slot

GRANULARITIES = ("sublayers", "blocks", "pairs")
PROBE = 4  # tokens that a block without its sub-blocks is tried on
NOT_BY_BLOCK = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id")  # lists, whatever their length
DROPPED = "dropped"
KEPT = "kept"


@dataclass(frozen=True)
class DropEffect:
    """What the lowest level of a drop unit does to the model.

    Attributes:
        blocks: Indices of the decoder blocks that are dropped, or that hold the sub-block.
        whole: Whether the blocks are dropped as a whole.
        writer: Name of the slot whose output a dropped sub-block would add to the residual stream; without that
            output the sub-block has no effect. None for whole blocks.
    """

    blocks: tuple[int, ...]
    whole: bool
    writer: str | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "DropEffect":
        """Return the effect that a row of the level store's manifest describes."""
        return cls(blocks=tuple(record["blocks"]), whole=bool(record["whole"]), writer=record["writer"])

    def record(self) -> dict[str, Any]:
        """Return the effect as JSON, for the level store's manifest."""
        return {"blocks": list(self.blocks), "whole": self.whole, "writer": self.writer}


@dataclass(frozen=True)
class Droppable:
    """Modules that can be dropped together, so that only the residual stream is left.

    Attributes:
        name: Path in the model; ``model.layers.4+5`` for two blocks.
        effect: What dropping it does.
        slots: Names of the slots in it.
        parameters: All its parameters.
    """

    name: str
    effect: DropEffect
    slots: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]

    @property
    def blocks(self) -> tuple[int, ...]:
        """The decoder blocks that it is, or that hold it."""
        return self.effect.blocks


class Drop:
    """What may be dropped.

    Args:
        granularity: ``sublayers`` (attention and MLP apart), ``blocks``, ``pairs`` of consecutive blocks; null: none.
        keep: Indices of blocks that must stay, negative ones from the end.

    Raises:
        SettingError: Unknown granularity, or an index is not a whole number.
    """

    def __init__(self, *, granularity: str | None = None, keep: Sequence[int] = ()) -> None:
        self.granularity = None if granularity is None else check_choice("granularity", granularity, GRANULARITIES)
        if isinstance(keep, str) or not isinstance(keep, Sequence):
            raise SettingError("keep", allowed="a list of block indices", got=keep)
        self.keep = tuple(check_int(f"keep[{position}]", index) for position, index in enumerate(keep))

    def describe(self) -> dict[str, Any]:
        """Return the settings, as part of the store's address."""
        return {"granularity": self.granularity, "keep": sorted(self.keep)}

    def options(self, anatomy: Anatomy) -> tuple[Droppable, ...]:
        """Return what may be dropped of a model, in the order in which it runs.

        Raises:
            SettingError: ``keep`` names a block that the model does not have.
        """
        count = len(anatomy.blocks)
        for position, index in enumerate(self.keep):
            if not -count <= index < count:
                raise SettingError(
                    f"keep[{position}]", owner=self, allowed=f"an integer from {-count} to {count - 1}", got=index
                )
        stay = {index % count for index in self.keep}
        if self.granularity is None:
            return ()
        return tuple(option for option in droppables(anatomy, self.granularity) if not stay & set(option.blocks))

    def rows(
        self,
        anatomy: Anatomy,
        options: Sequence[Droppable],
        compressed: Collection[str],
        hidden: Sequence[torch.Tensor] | None,
        *,
        tokens: Sequence[torch.Tensor] | None = None,
        add_up: Callable[[torch.Tensor], None] = lambda _sums: None,
    ) -> list[dict[str, Any]]:
        """Return the level store's manifest rows of some options.

        The cost of an option is that of its parameters, without the weights that are units themselves: those it gates.

        Args:
            anatomy: The model.
            options: Some of ``options``.
            compressed: Names of the slots that are units.
            hidden: Inputs of the first block of these options on calibration text, in batches; None: not yet known.
            tokens: Their token ids, each (windows, seq_len), which some models' blocks need.
            add_up: Sums a tensor in place over all processes that calibrate.
        """
        rows = []
        for option in options:
            gates = [name for name in option.slots if name in compressed]
            units = {id(slot.parameter) for slot in anatomy.slots if slot.name in gates}
            own = {id(p): p for p in option.parameters if id(p) not in units}.values()
            bits = sum(p.numel() * p.element_size() * 8 for p in own)
            levels = [
                {"name": DROPPED, "cost": 0, "nominal": {"kind": "kept", "number": 0.0}, "removed": 1.0},
                {"name": KEPT, "cost": bits, "nominal": {"kind": "kept", "number": 1.0}, "removed": 0.0},
            ]
            columns = (
                {}
                if hidden is None
                else {"influence": influence(anatomy, option, hidden, tokens=tokens, add_up=add_up)}
            )
            rows.append(
                {
                    "name": option.name,
                    "first": option.slots[0],
                    "block": option.blocks[0],
                    "numel": sum(p.numel() for p in own),
                    "levels": levels,
                    "gates": gates,
                    "drop": option.effect.record(),
                    "columns": columns,
                }
            )
        return rows


def droppables(anatomy: Anatomy, granularity: str) -> tuple[Droppable, ...]:
    """Return all modules that may be dropped at a granularity, in the order in which they run.

    A sub-block is a child of the block with slots in it; slots that are the block's own children (as in OPT's MLP)
    make up one sub-block together. Its writer is the slot that runs last.

    Args:
        anatomy: The model.
        granularity: ``sublayers``, ``blocks``, or ``pairs`` of consecutive blocks (a last odd one stays alone).

    Raises:
        SettingError: Unknown granularity.
    """
    check_choice("granularity", granularity, GRANULARITIES)
    blocks = range(len(anatomy.blocks))
    if granularity == "sublayers":
        return tuple(option for block in blocks for option in _sublayers(anatomy, block))
    step = 2 if granularity == "pairs" else 1
    return tuple(_whole_blocks(anatomy, tuple(blocks[start : start + step])) for start in blocks[::step])


def _whole_blocks(anatomy: Anatomy, blocks: tuple[int, ...]) -> Droppable:
    slots = tuple(slot.name for block in blocks for slot in anatomy.slots_of(block))
    parameters = tuple(parameter for block in blocks for parameter in anatomy.blocks[block].parameters())
    name = f"{anatomy.block_path}.{'+'.join(map(str, blocks))}"
    return Droppable(name, DropEffect(blocks, whole=True), slots, parameters)


def _sublayers(anatomy: Anatomy, block: int) -> list[Droppable]:
    path = f"{anatomy.block_path}.{block}"
    children: dict[str, list[Slot]] = {}
    for slot in anatomy.slots_of(block):
        child, _, deeper = slot.name.removeprefix(path + ".").partition(".")
        children.setdefault(child if deeper else "", []).append(slot)
    found = []
    for child, slots in children.items():
        modules = [anatomy.model.get_submodule(f"{path}.{child}")] if child else [slot.module for slot in slots]
        name = child or "+".join(slot.name.rpartition(".")[2] for slot in slots)
        parameters = tuple(parameter for module in modules for parameter in module.parameters())
        effect = DropEffect((block,), whole=False, writer=slots[-1].name)
        found.append(Droppable(f"{path}.{name}", effect, tuple(slot.name for slot in slots), parameters))
    return found


def influence(
    anatomy: Anatomy,
    option: Droppable,
    hidden: Sequence[torch.Tensor] | None,
    *,
    tokens: Sequence[torch.Tensor] | None = None,
    add_up: Callable[[torch.Tensor], None] = lambda _sums: None,
) -> float:
    """Return 1 - mean cosine similarity between the residual stream with and without an option.

    For whole blocks that is ShortGPT's block influence, between the blocks' input and output (arXiv 2403.03853,
    equation 1).

    Args:
        anatomy: The model.
        option: What is left out.
        hidden: Inputs of its first block, in batches of shape (batch, seq_len, hidden); None runs the whole model.
        tokens: Their token ids, which some models' blocks need.
        add_up: Sums a tensor in place over all processes that calibrate.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=anatomy.device)
    for batch, ids in zip(hidden or repeat(None), tokens or repeat(None), strict=False):
        given, present = _ends(anatomy, option.blocks, batch, ids)
        absent = given
        if option.effect.writer is not None:
            with silenced(anatomy.slot(option.effect.writer).module):
                _, absent = _ends(anatomy, option.blocks, batch, ids)
        cosine = functional.cosine_similarity(present.float(), absent.float(), dim=-1)
        sums += torch.stack([cosine.sum(dtype=torch.float64), torch.tensor(cosine.numel()).to(sums)])
    add_up(sums)
    return 1.0 - float(sums[0] / sums[1])


def _ends(
    anatomy: Anatomy, blocks: Sequence[int], hidden: torch.Tensor | None, tokens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the residual stream before and behind consecutive blocks.

    Args:
        anatomy: The model.
        blocks: Their indices.
        hidden: Input of the first of them (windows, seq_len, hidden); None runs the whole model.
        tokens: Token ids (windows, seq_len), which some models' blocks and the whole model need.
    """
    if hidden is None and tokens is not None:
        return anatomy.around(blocks[0], blocks[-1], tokens)
    assert hidden is not None
    given = present = hidden.to(anatomy.device)
    for block in blocks:
        present = anatomy.run_block(block, present, tokens)
    return given, present


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """Make a module that returns one tensor return zeros while the context lasts."""
    forward = module.forward
    with replaced_forward(module, lambda *args, **kwargs: torch.zeros_like(forward(*args, **kwargs))):
        yield


@contextmanager
def silenced_rows(module: nn.Module, gone: npt.NDArray[np.int64], rows: int) -> Iterator[None]:
    """Make a module return zeros for some rows of the population while the context lasts.

    Args:
        module: A module that returns one tensor.
        gone: Indices of the rows that get zeros.
        rows: Number of rows; the batch holds equally many sequences a row.
    """
    forward = module.forward

    def partly_silent(inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = forward(inputs)
        return outputs.view(rows, -1).index_fill(0, moved(gone, outputs.device), 0).view(outputs.shape)

    with replaced_forward(module, partly_silent):
        yield


@contextmanager
def removed(anatomy: Anatomy, effects: Iterable[DropEffect]) -> Iterator[None]:
    """Take what is dropped out of the model while the context lasts: blocks are gone, writers are all zeros."""
    effects = list(effects)
    writers = [anatomy.slot(effect.writer) for effect in effects if effect.writer is not None]
    blocks = {block for effect in effects if effect.whole for block in effect.blocks}
    with torch.no_grad(), _zeroed(writers), without_blocks(anatomy, blocks):
        yield


def merged(anatomy: Anatomy, effects: Iterable[DropEffect]) -> list[DropEffect]:
    """Return effects in which a block that loses all its sub-blocks is dropped as a whole, where it then does nothing.

    That is tried on a few tokens: a block may scale the residual stream, or add a bias behind its sub-blocks.

    Args:
        anatomy: The model.
        effects: What is dropped.
    """
    effects = list(effects)
    gone = {effect.writer for effect in effects if effect.writer is not None}
    writers: dict[int, list[str]] = {}
    for option in droppables(anatomy, "sublayers") if gone else ():
        writers.setdefault(option.blocks[0], []).append(str(option.effect.writer))
    empty = {block for block, names in writers.items() if gone.issuperset(names) and _passes(anatomy, block, names)}
    kept = [effect for effect in effects if effect.whole or effect.blocks[0] not in empty]
    return [*kept, *(DropEffect((block,), whole=True) for block in sorted(empty))]


@torch.no_grad()
def _passes(anatomy: Anatomy, block: int, writers: Sequence[str]) -> bool:
    """Return whether a block returns its input where its sub-blocks write nothing."""
    if anatomy.whole_because:
        return False
    tokens = torch.arange(PROBE)[None].to(anatomy.device)
    given = anatomy.embed(tokens)
    with ExitStack() as stack:
        for name in writers:
            stack.enter_context(silenced(anatomy.slot(name).module))
        return torch.equal(anatomy.run_block(block, given, tokens), given)


def dropped_parameters(anatomy: Anatomy, effects: Iterable[DropEffect]) -> set[int]:
    """Return the ids of all parameters in dropped sub-blocks."""
    dropped = {effect for effect in effects if not effect.whole}
    if not dropped:
        return set()
    return {
        id(parameter)
        for option in droppables(anatomy, "sublayers")
        if option.effect in dropped
        for parameter in option.parameters
    }


@contextmanager
def without_blocks(anatomy: Anatomy, gone: Collection[int]) -> Iterator[None]:
    """Take whole blocks out of the model and its config while the context lasts; the others are numbered anew."""
    if not gone:
        yield
        return
    model: Any = anatomy.model
    config = model.config.get_text_config()
    count = len(anatomy.blocks)
    kept = [index for index in range(count) if index not in gone]
    parent, _, name = anatomy.block_path.rpartition(".")
    around = model.get_submodule(parent)
    # one entry a block, as layer_types
    lists = {
        key: value
        for key, value in vars(config).items()
        if isinstance(value, list) and len(value) == count and key not in NOT_BY_BLOCK
    }
    setattr(around, name, nn.ModuleList([anatomy.blocks[index] for index in kept]))
    config.num_hidden_layers = len(kept)
    for key, value in lists.items():
        setattr(config, key, [value[index] for index in kept])
    try:
        yield
    finally:
        setattr(around, name, anatomy.blocks)
        config.num_hidden_layers = count
        for key, value in lists.items():
            setattr(config, key, value)


@contextmanager
def _zeroed(slots: Sequence[Slot]) -> Iterator[None]:
    """Set weight and bias of some slots to zero while the context lasts."""
    tensors = [parameter for slot in slots for parameter in slot.module.parameters(recurse=False)]
    before = [tensor.clone() for tensor in tensors]
    with torch.no_grad():
        for tensor in tensors:
            tensor.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in zip(tensors, before, strict=True):
                tensor.copy_(values)
