"""The plan of a level store: its units and their levels, and what they cost, known from shapes alone."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from evosweep.compressors.base import Compressor, LevelSpec, Plans
from evosweep.core.errors import SettingError
from evosweep.core.unit import ACTIVE_SHARE, Unit
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop, Droppable
from evosweep.models.expert_slots import RoutedSlot
from evosweep.models.slots import OuterSlot, Slot
from evosweep.store.coverage import Coverage, coverage_of
from evosweep.store.manifest_rows import ManifestLevel, ManifestUnit
from evosweep.store.statistics.base import check_needs, statistic_module
from evosweep.store.units import Units


@dataclass(frozen=True)
class StorePlan:
    """Everything about a store that is known before calibration; calculated once, by ``plan_store``.

    Attributes:
        anatomy: The dense model.
        compressor: Makes the levels of linear layers.
        drop: What may be dropped.
        levels: Planned levels of every compressed layer.
        dropped: The modules that may be dropped.
        needs: Statistics that the compressor reads.
        rows: All units, in the order in which the model computes them.
        fixed_bits: Bits of all parameters and saved buffers that belong to no unit, tied ones once, as the model has
            them.
        coverage: What share of the blocks' weights the units cover.
        outer: What is a unit beside the layers of the blocks.
        excluded: Names of what stays as it is though it could be a unit.
    """

    anatomy: Anatomy
    compressor: Compressor
    drop: Drop
    levels: Plans
    dropped: tuple[Droppable, ...]
    needs: frozenset[str]
    rows: tuple[ManifestUnit, ...]
    fixed_bits: int
    coverage: Coverage
    outer: Units = field(default_factory=Units)
    excluded: frozenset[str] = frozenset()

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """All units as searches see them, without what calibration measures."""
        return tuple(row.unit() for row in self.rows)

    @property
    def level_bits(self) -> int:
        """Bits of all levels of all compressed layers: the size of the store."""
        return sum(level.cost for levels in self.levels.values() for level in levels)


def plan_store(
    anatomy: Anatomy, compressor: Compressor, drop: Drop | None = None, units: Units | None = None
) -> StorePlan:
    """Return the plan of a store, so that a budget can be checked before any work.

    Args:
        anatomy: The dense model.
        compressor: Makes the levels of linear layers.
        drop: What may be dropped; None: nothing.
        units: What is a unit beside the layers of the blocks; None: nothing.

    Raises:
        SettingError: A setting does not fit a layer, or no unit is left to choose levels for.
        StoreError: The compressor needs an unknown statistic.
    """
    drop = drop or Drop()
    outer = units or Units()
    needs = check_needs(compressor)
    dropped = drop.options(anatomy)
    excluded = outer.excluded(anatomy, dropped)
    dropped = tuple(part for part in dropped if part.name not in excluded)
    shapes = {slot.name: slot.shape for slot in outer.layers(anatomy) if slot.name not in excluded}
    around = {name: made for name, made in outer.plan(anatomy).items() if name not in excluded}
    levels = {**compressor.plan(shapes), **around}
    rows = [ManifestUnit.from_json(row) for row in drop.rows(anatomy, dropped, levels, hidden=None)]
    rows += [planned_unit(slot, levels[slot.name]) for slot in anatomy.all_slots if slot.name in levels]
    if not rows:
        raise SettingError("", owner=compressor, allowed="something else than none where drop=none too", got="none")
    made = [slot for slot in anatomy.slots if slot.name in levels]
    outer.check_experts(anatomy.slots, levels)
    _check_measurable(compressor, needs, made)
    gone = [id(parameter) for part in dropped for parameter in part.parameters]
    coverage = coverage_of(anatomy, made, dropped=() if made else set(gone))
    if made:
        meant = [slot for slot in anatomy.slots if slot.name in excluded]
        outer.check_coverage(coverage_of(anatomy, [*made, *meant]) if meant else coverage)
    return StorePlan(
        anatomy=anatomy,
        compressor=compressor,
        drop=drop,
        levels=levels,
        dropped=dropped,
        needs=needs,
        rows=in_model_order(anatomy, rows),
        fixed_bits=_fixed_bits(anatomy, levels, dropped),
        outer=outer,
        excluded=excluded,
        coverage=coverage,
    )


def _check_measurable(compressor: Compressor, needs: Collection[str], slots: Sequence[Slot]) -> None:
    """Raise SettingError where a compressor needs what is measured of whole layers, and some slots are experts."""
    whole = sorted(name for name in needs if hasattr(statistic_module(name), "measure_model"))
    expert = next((slot.name for slot in slots if isinstance(slot, RoutedSlot)), None)
    if whole and expert is not None:
        raise SettingError(
            "",
            owner=compressor,
            allowed=f"one that needs no {', '.join(whole)}, which is not measured of single experts",
            got=f"{type(compressor).__name__} for {expert}",
        )


def planned_unit(slot: Slot, levels: Sequence[LevelSpec]) -> ManifestUnit:
    """Return what is known of a layer before it is compressed."""
    return ManifestUnit(
        name=slot.name,
        first=slot.name,
        block=slot.block,
        numel=slot.shape[0] * slot.shape[1],
        levels=tuple(ManifestLevel.planned(level) for level in levels),
        shape=slot.shape,
        group=slot.group,
        outer=isinstance(slot, OuterSlot),
        columns={ACTIVE_SHARE: slot.share} if isinstance(slot, RoutedSlot) else {},
    )


def in_model_order(anatomy: Anatomy, rows: Sequence[ManifestUnit]) -> tuple[ManifestUnit, ...]:
    """Return units in the order in which the model computes their first layers."""
    order = {slot.name: index for index, slot in enumerate(anatomy.all_slots)}
    return tuple(sorted(rows, key=lambda row: order[row.first]))


def _fixed_bits(anatomy: Anatomy, levels: Plans, dropped: Sequence[Droppable]) -> int:
    in_units = {id(slot.parameter) for slot in anatomy.all_slots if slot.name in levels}
    in_units |= {id(parameter) for part in dropped for parameter in part.parameters}
    saved = anatomy.model.state_dict(keep_vars=True)
    buffers = [tensor for name, tensor in anatomy.model.named_buffers() if name in saved]
    others = [parameter for parameter in anatomy.model.parameters() if id(parameter) not in in_units]
    return sum(tensor.numel() * tensor.element_size() * 8 for tensor in [*others, *buffers])
