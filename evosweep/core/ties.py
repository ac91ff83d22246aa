"""Ties: layers that share one level, as one unit whose cost is their sum.

A store keeps levels by layer; the tie is made in the problem alone. ``tied`` makes the units of a search, ``Expansion``
turns its genomes into those of the layers, and allocations are written by layer.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from evosweep.core.allocation import Allocation
from evosweep.core.errors import EvosweepError, SettingError, did_you_mean
from evosweep.core.patterns import matcher
from evosweep.core.unit import Level, Unit

Indices = npt.NDArray[np.int64]
Names = tuple[str, ...]


def tied(units: Sequence[Unit], ties: Iterable[Sequence[str]], *, common: bool = False) -> tuple[Unit, ...]:
    """Return units in which each tie is one unit, at the place of its first layer.

    Cost and layer error of a tied unit's level are sums, as for the stacked matrix; its columns are means by weights.

    Args:
        units: The layers, and what can be dropped.
        ties: Names of layers that share a level; those that are no units are ignored. Ties that share a layer are one.
        common: Whether a tied unit has the levels that its layers have in common, where a store left some out that
            others beat; otherwise all must have the same.

    Raises:
        SettingError: Layers of a tie have other levels than each other, are in several blocks, or are dropped apart.
    """
    known = {unit.name: unit for unit in units}
    groups = joined_ties(ties, known)
    made: dict[str, Unit] = {}
    for names in groups:
        if len(names) > 1:
            members = tuple(unit for unit in units if unit.name in names)
            _check_alike(members, units, common=common)
            made |= dict.fromkeys(names, _one(members))
    if not made:
        return tuple(units)
    found = {one.name: one for one in (made.get(unit.name, unit) for unit in units)}
    return tuple(replace(unit, gates=_renamed(unit.gates, made)) for unit in found.values())


def matching(units: Sequence[Unit], patterns: Sequence[str]) -> list[Names]:
    """Return the layers that each pattern matches in each block, a tuple for each.

    A pattern is a glob (``self_attn.*``) or a regular expression (``mlp.(gate|up)_proj``) for a layer's whole name, or
    its path inside of the block.

    Raises:
        SettingError: A pattern is neither, or matches no two layers of any block.
    """
    layers = [unit for unit in units if not unit.gates and not unit.outer]
    found: list[Names] = []
    for pattern in patterns:
        matches = matcher(pattern, setting="tie")
        blocks: dict[int, list[str]] = {}
        for unit in layers:
            if matches(unit.kind) or matches(unit.name):
                blocks.setdefault(unit.block, []).append(unit.name)
        groups = [tuple(names) for names in blocks.values() if len(names) > 1]
        if not groups:
            kinds = list(dict.fromkeys(unit.kind for unit in layers))
            matched = next((names[0] for names in blocks.values()), None)
            raise SettingError(
                "tie",
                allowed="none, fused, or patterns that match two layers of a block or more",
                got=pattern,
                hint=f"it matches {matched} alone"
                if matched
                else f"layers are {', '.join(kinds[:12])}{did_you_mean(pattern, kinds)}",
            )
        found += groups
    return found


def loose(units: Sequence[Unit], ties: Iterable[Sequence[str]]) -> list[Names]:
    """Return the ties that units do not keep: layers that must share a level, where a search may give them two.

    Args:
        units: Of a problem.
        ties: Names of layers that must share a level.
    """
    owner = {layer.name: unit for unit in units for layer in unit.layers}
    found = []
    for names in ties:
        owners = {owner[name].name: owner[name].level_names for name in names if name in owner}
        alike = len(set(owners.values())) <= 1 and all(len(levels) == 1 for levels in owners.values())
        if len(owners) > 1 and not alike:
            found.append(tuple(names))
    return found


def bits_to_tie(units: Sequence[Unit], ties: Iterable[Sequence[str]], genome: Indices) -> int:
    """Return by how many bits a genome grows where the layers of each tie all take the dearest level that one has.

    Args:
        units: Of a problem.
        ties: Names of layers that must share a level.
        genome: Level of each unit, shape (units,).
    """
    chosen = {
        layer.name: unit.level_names[level] for unit, level in zip(units, genome, strict=True) for layer in unit.layers
    }
    costs = {layer.name: {level.name: level.cost for level in layer.levels} for unit in units for layer in unit.layers}
    total = 0
    for names in ties:
        now = sum(costs[name][chosen[name]] for name in names)
        total += max(sum(costs[name].get(chosen[other], 0) for name in names) for other in names) - now
    return total


def contracted(units: Sequence[Unit], allocation: Mapping[str, str]) -> Mapping[str, str]:
    """Return an allocation in which tied layers that are named one by one are their unit.

    Args:
        units: Of a problem.
        allocation: Level of every unit or layer.

    Raises:
        EvosweepError: Tied layers have different levels in it.
    """
    if not any(unit.members for unit in units):
        return allocation
    result = dict(allocation)
    for unit in units:
        given = {layer.name: result[layer.name] for layer in unit.members if layer.name in result}
        if unit.name in result or len(given) < len(unit.members) or not given:
            continue
        if len(set(given.values())) > 1:
            levels = ", ".join(f"{name} {level}" for name, level in given.items())
            raise EvosweepError(f"tied layers must share a level, and the allocation has {levels}; see units.tie")
        result = {name: level for name, level in result.items() if name not in given}
        result[unit.name] = next(iter(given.values()))
    return result


def by_layer(units: Sequence[Unit], allocation: Mapping[str, str]) -> Allocation:
    """Return an allocation of units as one of layers."""
    return Allocation({layer.name: allocation[unit.name] for unit in units for layer in unit.layers})


@dataclass(frozen=True)
class Expansion:
    """Turns genomes of tied units into genomes of layers.

    Attributes:
        owner: Index of the tied unit that each layer belongs to, shape (layers,).
        levels: Level of each layer at each level of its unit, shape (layers, longest ladder).
        units: Number of tied units.
    """

    owner: Indices
    levels: Indices
    units: int

    @classmethod
    def of(cls, units: Sequence[Unit], layers: Sequence[Unit]) -> "Expansion":
        """Return the expansion from tied units to their layers, in the order of ``layers``."""
        index_of = {layer.name: index for index, unit in enumerate(units) for layer in unit.layers}
        owner = np.array([index_of[layer.name] for layer in layers], dtype=np.int64)
        table = np.zeros((len(layers), max(len(unit.levels) for unit in units)), dtype=np.int64)
        for row, layer in enumerate(layers):
            names = units[owner[row]].level_names
            table[row, : len(names)] = [layer.level_names.index(name) for name in names]
        return cls(owner, table, len(units))

    def __call__(self, genomes: Indices) -> Indices:
        """Return genomes of layers, shape (..., layers), for such or for genomes of units, shape (..., units).

        Raises:
            EvosweepError: They are neither.
        """
        width = genomes.shape[-1]
        if width == len(self.owner):
            return genomes
        if width != self.units:
            raise EvosweepError(f"a genome has {self.units} units or {len(self.owner)} layers here, got {width}")
        return self.levels[np.arange(len(self.owner)), genomes[..., self.owner]]


def _renamed(gates: Sequence[str], made: Mapping[str, Unit]) -> Names:
    """Return names of gated units, tied ones by their unit's name."""
    return tuple(dict.fromkeys(made[name].name if name in made else name for name in gates))


def joined_ties(ties: Iterable[Sequence[str]], known: Collection[str]) -> list[set[str]]:
    """Return ties with those joined that share a layer; names that are not known are left out."""
    found: list[set[str]] = []
    for names in ties:
        joined = {name for name in names if name in known}
        apart = []
        for other in found:
            if other & joined:
                joined |= other
            else:
                apart.append(other)
        found = [*apart, joined]
    return found


def _check_alike(members: Sequence[Unit], units: Sequence[Unit], *, common: bool) -> None:
    """Raise SettingError where layers cannot be one unit."""
    first = members[0]
    gate = {name: unit.name for unit in units for name in unit.gates}
    for other in members[1:]:
        hint = ""
        if other.block != first.block:
            hint = f"{first.name} and {other.name} are in different blocks"
        elif gate.get(other.name) != gate.get(first.name):
            hint = f"{first.name} and {other.name} are dropped apart from each other: see drop"
        elif other.gates or other.outer or first.gates or first.outer:
            hint = f"{(other if other.gates or other.outer else first).name} is no layer of a block"
        else:
            lacking = _lacking(first, other, common=common)
            if lacking:
                hint = f"{lacking}: give both the same levels, or do not tie them"
        if hint:
            raise SettingError(
                "tie",
                allowed="ties of layers with the same levels",
                got="+".join(unit.name.rpartition(".")[2] for unit in members),
                hint=hint,
            )


def _lacking(first: Unit, other: Unit, *, common: bool) -> str:
    """Return which level one of two layers lacks, with ``common`` that they share none; nothing where all is well."""
    if common:
        return (
            "" if set(first.level_names) & set(other.level_names) else f"{first.name} and {other.name} share no level"
        )
    for one, two in ((first, other), (other, first)):
        missing = [name for name in one.level_names if name not in two.level_names]
        if missing:
            return (
                f"{two.name} has no level {missing[0]}, which {one.name} has{did_you_mean(missing[0], two.level_names)}"
            )
    return ""


def _one(members: Sequence[Unit]) -> Unit:
    """Return layers as one unit, ``model.layers.0.self_attn.q_proj+k_proj+v_proj``."""
    first = members[0]
    numel = sum(unit.numel for unit in members)
    by_name = [{level.name: level for level in unit.levels} for unit in members]
    names = [name for name in first.level_names if all(name in levels for levels in by_name)]
    levels = [_sum([levels[name] for levels in by_name], [unit.numel for unit in members]) for name in names]
    shared = set.intersection(*(set(unit.columns) for unit in members))
    columns = {name: sum(unit.columns[name] * unit.numel for unit in members) / numel for name in sorted(shared)}
    return Unit(
        name=_joined([unit.name for unit in members]),
        numel=numel,
        block=first.block,
        levels=tuple(sorted(levels, key=lambda level: level.cost)),
        columns=columns,
        members=tuple(members),
    )


def _joined(names: Sequence[str]) -> str:
    """Return names joined by ``+`` behind the path that they share; ``*`` stands for numbers that alone differ."""
    parts = [name.split(".") for name in names]
    differing = [position for position, found in enumerate(zip(*parts, strict=False)) if len(set(found)) > 1]
    if len(differing) == 1 and len({len(part) for part in parts}) == 1:
        position = differing[0]
        if all(part[position].isdecimal() for part in parts):
            return ".".join([*parts[0][:position], "*", *parts[0][position + 1 :]])
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return ".".join([*parts[0][:shared], "+".join(".".join(part[shared:]) for part in parts)])


def _sum(levels: Sequence[Level], numels: Sequence[int]) -> Level:
    """Return one level of several layers as a level of their stacked matrix."""
    errors = [level.error for level in levels]
    wholes = [
        level.error / level.relative_error if level.error is not None and level.relative_error else None
        for level in levels
    ]
    error = sum(value for value in errors if value is not None) if None not in errors else None
    whole = sum(value for value in wholes if value is not None) if None not in wholes else None
    zero = all(level.relative_error == 0 for level in levels)
    return Level(
        name=levels[0].name,
        cost=sum(level.cost for level in levels),
        error=error,
        relative_error=0.0 if zero else error / whole if error is not None and whole else None,
        nominal=levels[0].nominal if len({level.nominal for level in levels}) == 1 else None,
        removed=sum(level.removed * numel for level, numel in zip(levels, numels, strict=True)) / sum(numels),
    )
