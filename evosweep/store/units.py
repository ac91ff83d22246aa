"""What is a unit: embedding and head where they have levels of their own, and layers that are tied to one level."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evosweep.compressors.base import Compressor, LevelSpec, identity
from evosweep.core.checks import check_choice, check_number
from evosweep.core.errors import SettingError
from evosweep.core.rules import Ladders, Rules
from evosweep.core.ties import matching, tied
from evosweep.core.unit import Unit
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Droppable
from evosweep.models.expert_slots import ExpertSlot, PackedSlot
from evosweep.models.experts import alike_experts
from evosweep.models.fusion import fused_layers
from evosweep.models.slots import Slot
from evosweep.store.coverage import Coverage, compressible
from evosweep.store.statistics.base import check_needs, statistic_module

NONE = "none"
FUSED = "fused"
TIES = (NONE, FUSED)
BLOCK = "block"
EXPERTS = (BLOCK, "each")
MOST_UNITS = 20_000


@dataclass(frozen=True)
class Units:
    """What is a unit beside the layers of the blocks, and which of those are one.

    Attributes:
        embedding: Makes the levels of the token embedding; None: it is no unit. Where head and embedding are one
            tensor, its levels serve as both.
        head: Makes the levels of the output matrix, where that is a tensor of its own; None: it is no unit.
        tie: Which layers are one unit with one level: ``none``, ``fused`` (those that serving engines run as one
            product: query, key and value; gate and up), or patterns as for ``core.ties.matching``; among patterns,
            ``fused`` stands for those layers.
        exclude: Patterns of what is no unit and stays as it is: layers, and what could be dropped.
        fix: Level that units have, by pattern, as for ``core.rules.Rules``.
        min: Level that units have at least.
        max: Level that units have at most.
        include: Patterns of layers that are units though they route, gate or are narrow, as for
            ``store.coverage.compressible``.
        coverage: Least share of the blocks' weights, from 0 to 1, that units must cover.
        experts: What is a unit of a mixture of experts: ``block``, the matrices of all experts of a block that do the
            same; ``each``, every expert's matrix.

    Raises:
        SettingError: An argument is none of these.
    """

    embedding: Compressor | None = None
    head: Compressor | None = None
    tie: str | Sequence[str] = NONE
    exclude: Sequence[str] = ()
    fix: Mapping[str, Any] | None = None
    min: Mapping[str, Any] | None = None
    max: Mapping[str, Any] | None = None
    include: Sequence[str] = ()
    coverage: float = 0.95
    experts: str = BLOCK

    def __post_init__(self) -> None:
        with self._named():
            _ = self.rules
        if not isinstance(self.include, Sequence) or isinstance(self.include, str) or not all(self.include):
            raise SettingError("include", owner=self, allowed="a list of patterns", got=self.include)
        check_number("coverage", self.coverage, low=0, high=1)
        if not isinstance(self.tie, str) and not _texts(self.tie):
            raise SettingError("tie", owner=self, allowed="none, fused, or a list of patterns", got=self.tie)
        if isinstance(self.tie, str):
            check_choice("tie", self.tie, TIES)
        check_choice("experts", self.experts, EXPERTS)

    def layers(self, anatomy: Anatomy) -> list[Slot]:
        """Return the layers of a model's blocks that are units.

        Raises:
            SettingError: A pattern of ``include`` matches nothing.
        """
        try:
            return compressible(anatomy, self.include)
        except SettingError as error:
            error.owner = self
            raise

    def check_coverage(self, coverage: Coverage) -> None:
        """Raise SettingError where units cover a smaller share of the blocks' weights than was asked for."""
        if coverage.share < self.coverage:
            share = int(1000 * coverage.share) / 1000
            raise SettingError(
                "coverage",
                owner=self,
                got=self.coverage,
                allowed=f"at most {share:g} for this model, where that is meant",
                hint=f"no unit covers {coverage.named}",
            )

    def tied(self, units: Sequence[Unit], anatomy: Anatomy, *, common: bool = False) -> tuple[Unit, ...]:
        """Return a store's units with ``tie`` applied.

        Args:
            units: The layers, and what can be dropped.
            anatomy: The model.
            common: As for ``core.ties.tied``.

        Raises:
            SettingError: A pattern matches nothing, layers that cannot be one unit are tied, or single experts would be
                more units than a search can handle.
        """
        with self._named():
            made = tied(units, self._ties(units, anatomy), common=common)
            if len(made) > MOST_UNITS and self.experts != BLOCK:
                raise SettingError(
                    "experts",
                    allowed=f"{BLOCK}, which ties the experts of a block, or a model with at most {MOST_UNITS} units",
                    got=self.experts,
                    hint=f"every expert by itself makes {len(made)} units here",
                )
        return made

    def check_experts(self, slots: Sequence[Slot], made: Collection[str]) -> None:
        """Raise SettingError where only some experts of a mixture are units: they share a parameter.

        Args:
            slots: Of the model's blocks.
            made: Names of those that are units.
        """
        owners: dict[int, list[Slot]] = {}
        for slot in slots:
            if isinstance(slot, ExpertSlot | PackedSlot):
                owners.setdefault(id(slot.parameter), []).append(slot)
        for shared in owners.values():
            left = [slot.name for slot in shared if slot.name not in made]
            if left and len(left) < len(shared):
                raise SettingError(
                    "exclude",
                    owner=self,
                    allowed="all experts of a mixture or none of them",
                    got=left[0],
                    hint=f"{len(left)} of {len(shared)} matrices of one parameter would stay as they are",
                )

    def _ties(self, units: Sequence[Unit], anatomy: Anatomy) -> list[tuple[str, ...]]:
        """Return the names of layers that share a level, a tuple for each tie."""
        wanted = [self.tie] if isinstance(self.tie, str) else list(self.tie)
        ties = matching(units, [pattern for pattern in wanted if pattern not in TIES])
        ties += fused_layers(anatomy) if FUSED in wanted else []
        return ties + (alike_experts(anatomy) if self.experts == BLOCK else [])

    @cached_property
    def rules(self) -> Rules:
        """What takes no part, and which levels the units may have."""
        return Rules(self.exclude, fix=self.fix or {}, min=self.min or {}, max=self.max or {})

    def excluded(self, anatomy: Anatomy, dropped: Sequence[Droppable] = ()) -> frozenset[str]:
        """Return the names of layers, of embedding and head, and of what could be dropped, that stay as they are.

        Args:
            anatomy: The model.
            dropped: What could be dropped of it.

        Raises:
            SettingError: A pattern matches nothing, or nothing is left.
        """
        blocks = {slot.name: slot.block for slot in anatomy.slots} | {part.name: part.blocks[0] for part in dropped}
        names = {name: name.split(f".{block}.", 1)[-1] for name, block in blocks.items()}
        names |= {name: name for name in self.compressors(anatomy)}
        with self._named():
            return self.rules.excluded(names)

    def ladders(self, units: Sequence[Unit], anatomy: Anatomy) -> Ladders:
        """Return the names of the levels that remain of every unit that a rule is about.

        Args:
            units: With all their levels, tied layers one by one.
            anatomy: The model.

        Raises:
            SettingError: A pattern matches nothing, a unit lacks the level, or rules contradict each other.
        """
        with self._named():
            return self.rules.ladders(units, self._ties(units, anatomy))

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Say of errors whose argument they are about."""
        try:
            yield
        except SettingError as error:
            error.owner = self
            raise

    @property
    def any(self) -> bool:
        """Whether anything outside of the blocks is a unit."""
        return self.embedding is not None or self.head is not None

    def describe(self) -> dict[str, Any]:
        """Return the compressors, as part of the store's address."""
        return {role: identity(compressor) for role, compressor in self._given.items()}

    @property
    def _given(self) -> dict[str, Compressor]:
        roles = {"embedding": self.embedding, "head": self.head}
        return {role: compressor for role, compressor in roles.items() if compressor is not None}

    def compressors(self, anatomy: Anatomy) -> dict[str, Compressor]:
        """Return the compressor of every unit outside of the blocks of a model, by the unit's name.

        Raises:
            SettingError: The embedding's levels need statistics of inputs, and it is not the head, too.
        """
        found = {anatomy.outer[role].name: made for role, made in self._given.items() if role in anatomy.outer}
        for role, compressor in self._given.items():
            needs = sorted(check_needs(compressor))
            looked_up = role == "embedding" and not anatomy.outer["embedding"].tied
            if needs and (looked_up or any(hasattr(statistic_module(name), "measure_model") for name in needs)):
                raise SettingError(
                    role,
                    owner=self,
                    got=type(compressor).__name__,
                    allowed=f"a compressor that needs no {', '.join(needs)}, such as rounding to nearest",
                )
        return found

    def plan(self, anatomy: Anatomy) -> dict[str, list[LevelSpec]]:
        """Return the levels of every unit outside of the blocks, by the unit's name.

        Raises:
            SettingError: A setting does not fit.
        """
        shapes: Mapping[str, tuple[int, int]] = {slot.name: slot.shape for slot in anatomy.outer.values()}
        return {
            name: list(levels)
            for name, compressor in self.compressors(anatomy).items()
            for levels in compressor.plan({name: shapes[name]}).values()
        }


def _texts(value: object) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(text, str) and text for text in value)
