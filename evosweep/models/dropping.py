"""Dropping of attention and MLP sub-blocks, blocks and pairs of blocks: the units, and their effect on the model.

Everything about it is here: which modules a granularity allows to drop (``Drop.options``), how much each matters
(``influence``), what it does (``DropEffect``), and what a model on disk looks like without it (``removed``,
``dropped_parameters``). Which modules are sub-blocks is found in ``models.sublayers``.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from evosweep.core.checks import check_choice, check_int
from evosweep.core.errors import SettingError
from evosweep.models.anatomy import Anatomy
from evosweep.models.probe import Call
from evosweep.models.renumber import rehearse, without_blocks
from evosweep.models.sublayers import Sublayer, parameter_names, silenced, zeros_in

GRANULARITIES = ("sublayers", "blocks", "pairs")
DROPPED = "dropped"
KEPT = "kept"


@dataclass(frozen=True)
class DropEffect:
    """What the lowest level of a drop unit does to the model.

    Attributes:
        blocks: Indices of the decoder blocks that are dropped, or that hold the sub-block.
        whole: Whether the blocks are dropped as a whole.
        writer: Path of the module whose output a dropped sub-block would add to the residual stream; without that
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
        kept_because: Why it cannot be dropped, if so, in a few words that follow its name.
    """

    name: str
    effect: DropEffect
    slots: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]

    kept_because: str = ""

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
        by = {"by": "output"} if self.granularity == "sublayers" else {}  # before, sub-blocks ended with a linear layer
        return {"granularity": self.granularity, "keep": sorted(self.keep), **by}

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
        found = [option for option in droppables(anatomy, self.granularity) if not stay & set(option.blocks)]
        kept = {option.name: option.kept_because for option in found if option.kept_because}
        if kept:
            name, reason = next(iter(kept.items()))
            also = f", and {len(kept) - 1} more like it" if len(kept) > 1 else ""
            raise SettingError(
                "granularity",
                owner=self,
                got=self.granularity,
                allowed=f"another one for this model, or null: {name} {reason}{also}",
                hint="drop.keep names blocks that stay",
            )
        if not found and len(stay) < count:
            raise SettingError(
                "granularity",
                owner=self,
                got=self.granularity,
                allowed="blocks or pairs for this model, whose blocks have no part that can be missing alone",
            )
        return tuple(found)

    def check_export(self, anatomy: Anatomy) -> None:
        """Raise SettingError where transformers would not build the model again without blocks that may be dropped.

        A few choices are tried, on sketches without memory for the weights: the first block, the last, one in the
        middle, and every other one.
        """
        if self.granularity not in ("blocks", "pairs"):
            return
        may_go = [option.blocks for option in self.options(anatomy)]
        for chosen in ([0], [-1], [len(may_go) // 2], [*range(0, len(may_go), 2)], [*range(1, len(may_go), 2)]):
            gone = sorted({block for index in chosen if may_go for block in may_go[index]})
            reason = rehearse(anatomy, gone) if 0 < len(gone) < len(anatomy.blocks) else ""
            if reason:
                raise SettingError(
                    "granularity",
                    owner=self,
                    got=self.granularity,
                    allowed="sublayers, or null, where this model is exported",
                    hint=f"without {_listed(gone)} {reason}; drop.keep names blocks that stay; or export=none",
                )

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
                if hidden is None and tokens is None
                else {"influence": influence(anatomy, option, hidden, tokens=tokens, add_up=add_up)}
            )
            rows.append(
                {
                    "name": option.name,
                    "first": option.slots[0] if option.slots else _first_slot(anatomy, option.blocks[0]),
                    "block": option.blocks[0],
                    "numel": sum(p.numel() for p in own),
                    "levels": levels,
                    "gates": gates,
                    "drop": option.effect.record(),
                    "columns": columns,
                }
            )
        return rows


def _first_slot(anatomy: Anatomy, block: int) -> str:
    """Return the name of the first slot of a block, or of the last one before it where it has none."""
    here = [slot.name for slot in anatomy.slots_of(block)]
    before = [slot.name for slot in anatomy.all_slots if slot.block < block]
    return here[0] if here else before[-1]


def droppables(anatomy: Anatomy, granularity: str) -> tuple[Droppable, ...]:
    """Return all modules that may be dropped at a granularity, in the order in which they run.

    A sub-block is a child of the block without whose output the residual stream goes on (``models.sublayers``); linear
    layers that are the block's own children (as in OPT's MLP) make up one sub-block together.

    Args:
        anatomy: The model.
        granularity: ``sublayers``, ``blocks``, or ``pairs`` of consecutive blocks (a last odd one stays alone).

    Raises:
        SettingError: Unknown granularity.
    """
    check_choice("granularity", granularity, GRANULARITIES)
    blocks = range(len(anatomy.blocks))
    if granularity == "sublayers":
        return tuple(_sublayer(found) for found in anatomy.sublayers)
    step = 2 if granularity == "pairs" else 1
    needed = _needed(anatomy)
    return tuple(_whole_blocks(anatomy, tuple(blocks[start : start + step]), needed) for start in blocks[::step])


def _needed(anatomy: Anatomy) -> dict[int, str]:
    """Return the blocks that give other blocks more than hidden states, and what."""
    found: dict[int, str] = {}

    def inspect(block: int, call: Call) -> None:
        reason = call.passes_on()
        if reason:
            found[block] = reason

    anatomy.probe_blocks(inspect)
    return found


def _listed(blocks: Sequence[int]) -> str:
    return f"block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))}"


def _whole_blocks(anatomy: Anatomy, blocks: tuple[int, ...], needed: Mapping[int, str]) -> Droppable:
    slots = tuple(slot.name for block in blocks for slot in anatomy.slots_of(block))
    parameters = tuple(parameter for block in blocks for parameter in anatomy.blocks[block].parameters())
    name = f"{anatomy.block_path}.{'+'.join(map(str, blocks))}"
    inside = tuple(f"{anatomy.block_path}.{block}." for block in blocks)
    owners = parameter_names(anatomy.model)
    names = [name for parameter in parameters for name in owners[id(parameter)]]
    reasons = [f"shares parameters with {other}" for other in names if not other.startswith(inside)]
    reasons += [needed[block] for block in blocks if block in needed]
    return Droppable(name, DropEffect(blocks, whole=True), slots, parameters, next(iter(reasons), ""))


def _sublayer(found: Sublayer) -> Droppable:
    effect = DropEffect((found.block,), whole=False, writer=found.writer)
    reason = f"shares parameters with {found.shared}" if found.shared else ""
    return Droppable(found.name, effect, found.slots, found.parameters, reason)


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
            with silenced(anatomy.model.get_submodule(option.effect.writer)):
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
def removed(anatomy: Anatomy, effects: Iterable[DropEffect]) -> Iterator[None]:
    """Take what is dropped out of the model while the context lasts: blocks are gone, sub-blocks are all zeros."""
    effects = list(effects)
    blocks = {block for effect in effects if effect.whole for block in effect.blocks}
    with torch.no_grad(), zeros_in(_gone(anatomy, effects)), without_blocks(anatomy, blocks):
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
    without = {block: names for block, names in writers.items() if gone.issuperset(names)}
    empty = _passing(anatomy, without) if without else set()
    if empty and rehearse(anatomy, empty | {block for effect in effects if effect.whole for block in effect.blocks}):
        empty = set()  # they stay as blocks of zeros
    kept = [effect for effect in effects if effect.whole or effect.blocks[0] not in empty]
    return [*kept, *(DropEffect((block,), whole=True) for block in sorted(empty))]


def _passing(anatomy: Anatomy, writers: Mapping[int, Sequence[str]]) -> set[int]:
    """Return the blocks that return their input where their sub-blocks write nothing.

    Args:
        anatomy: The model.
        writers: Names of the modules that give no output, by block.
    """
    found = set()

    def inspect(block: int, call: Call) -> None:
        if block in writers:
            with ExitStack() as stack:
                for name in writers[block]:
                    stack.enter_context(silenced(anatomy.model.get_submodule(name)))
                if torch.equal(call.run()[0], call.given):
                    found.add(block)

    anatomy.probe_blocks(inspect)
    return found


def dropped_parameters(anatomy: Anatomy, effects: Iterable[DropEffect]) -> set[int]:
    """Return the ids of all parameters in dropped sub-blocks."""
    return {id(parameter) for parameter in _gone(anatomy, effects)}


def _gone(anatomy: Anatomy, effects: Iterable[DropEffect]) -> list[nn.Parameter]:
    """Return all parameters in dropped sub-blocks."""
    writers = {effect.writer for effect in effects if not effect.whole}
    options = anatomy.sublayers if writers else ()
    return [parameter for option in options if option.writer in writers for parameter in option.parameters]
