"""Reads what a level is to other tools, from its plan before a search and from its payload after it."""

from dataclasses import replace
from typing import Any

from evosweep.compressors.base import Compressor, LevelSpec
from evosweep.compressors.float_scales import FloatSpec
from evosweep.compressors.floating import BLOCKS
from evosweep.compressors.integer import IntegerLevels
from evosweep.core.unit import Level
from evosweep.exporters.base import Winner
from evosweep.exporters.recipes.listing import Listing, Setting
from evosweep.exporters.recipes.llama_cpp_recipe import BITS
from evosweep.models.load import LoadedModel

INTEGERS = "grouped_int"
FLOATS = "float_blocks"
DENSE = "plain"


def planned_setting(compressor: Compressor, level: LevelSpec, columns: int) -> Setting | None:
    """Return what a planned level is to other tools; None where only its payload shows that.

    Args:
        compressor: Makes it.
        level: As planned.
        columns: Input features of the layer.
    """
    named = _named(level.name, columns)
    if named is not None:
        return named
    if isinstance(compressor, IntegerLevels):
        group = None if compressor.group is None else compressor.group_of(columns)
        return Setting(level.name, columns, int(level.nominal.number), group, compressor.symmetric)
    if isinstance(level.spec, FloatSpec):
        return Setting(level.name, columns, number=_number(level.name, level.spec.element))
    return None


def stored_setting(winner: Winner, index: int, columns: int) -> Setting:
    """Return what a unit's level is to other tools.

    Args:
        winner: The allocation.
        index: Of the unit.
        columns: Input features of the layer.
    """
    unit = winner.problem.units[index]
    level: Level = unit.levels[int(winner.genome[index])]
    named = _named(level.name, columns)
    if named is not None:
        return named
    stored = winner.stored(index)
    kind = stored.format.rpartition(".")[2]
    meta: Any = stored.meta
    if kind == INTEGERS:
        symmetric = "zeros" not in stored.layout.tensors
        return Setting(level.name, columns, int(meta["width"]), int(meta["group"]), symmetric)
    if kind == FLOATS:
        return Setting(level.name, columns, number=_number(level.name, str(meta["element"])))
    return Setting(level.name, columns, dense=kind == DENSE and level.removed == 0)


def listing_of(winner: Winner, loaded: LoadedModel, model: str) -> Listing:
    """Return an allocation layer by layer.

    Args:
        winner: The allocation.
        loaded: The dense model.
        model: Its name in commands.
    """
    config: Any = loaded.model.config
    config = config.get_text_config()
    return Listing(
        model=model,
        family=config.model_type,
        blocks=len(winner.evaluator.anatomy.blocks),
        layers=_by_row(
            {slot.name: stored_setting(winner, index, slot.shape[1]) for slot, index in winner.slots.items()}
        ),
        genome=winner.genome,
        problem=winner.problem,
    )


def _by_row(layers: dict[str, Setting]) -> dict[str, Setting]:
    """Return layers with a scale a row where all groups are whole rows, though rows differ in length."""
    grouped = [setting for setting in layers.values() if setting.group is not None]
    whole = len({setting.columns for setting in grouped}) > 1 and all(one.group == one.columns for one in grouped)
    return {path: replace(one, group=None) if whole else one for path, one in layers.items()}


def _named(level: str, columns: int) -> Setting | None:
    """Return the setting of a level that is called after a ggml type."""
    return Setting(level, columns, ggml=level.upper()) if level.upper() in BITS else None


def _number(level: str, element: str) -> str:
    """Return the name of a floating-point format that engines know, else that of its elements."""
    return level if level in BLOCKS else element
