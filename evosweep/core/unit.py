"""Units, the modules of a model that get a level each, and levels, the ways in which a unit can be compressed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

ACTIVE_SHARE = "active_share"  # column of an expert's matrix: share of a mixture's experts that each token goes to
Kind = Literal["bits", "sparsity", "rank", "kept", "bits_per_weight"]


@dataclass(frozen=True)
class Nominal:
    """The number by which users know a level (3 bits, 50 % sparsity), and its kind.

    Attributes:
        kind: ``bits``: width of a code; ``sparsity``: share of weights removed; ``rank``: of a low-rank factor;
            ``kept``: 1 for a part of the model that is there, 0 for one that is dropped; ``bits_per_weight``: true
            bits, for levels that mix kinds.
        number: In the unit that the kind says.
    """

    kind: Kind
    number: float


@dataclass(frozen=True)
class Level:
    """One way in which a unit can be compressed.

    Attributes:
        name: Short and unique within the unit, e.g. ``3bit``; what Optuna and allocation.json show.
        cost: Size in bits of the exported form: codes, scales, zeros, masks.
        error: Layer-output error ‖(W−Ŵ)x‖², (weighted) mean over the calibration tokens x, if known.
        relative_error: The same over the mean of ‖Wx‖².
        nominal: What the level is called by: so many bits, so much sparsity. None where it has no number.
        removed: Share of the unit's weights that are not there any more.
    """

    name: str
    cost: int
    error: float | None = None
    relative_error: float | None = None
    nominal: Nominal | None = None
    removed: float = 0.0


@dataclass(frozen=True)
class Unit:
    """A module of the model that gets a level of its own: a linear layer, or a block or module that can be dropped.

    Attributes:
        name: Path of the module in the model.
        numel: Weights in it.
        block: Index of the decoder block that holds it.
        levels: Its ladder, by rising cost.
        columns: Numbers about it that allocators read (outlier ratios, sensitivities ...).
        gates: Names of units that are gone, cost and all, while this one is at its lowest level: what is inside a
            dropped sub-block.
        outer: Whether it lies outside of the blocks (embedding, head), with levels of its own.
        members: The layers that share its level, where it is several tied ones: see ``core.ties``.
    """

    name: str
    numel: int
    block: int
    levels: tuple[Level, ...]
    columns: Mapping[str, float] = field(default_factory=dict)
    gates: tuple[str, ...] = ()
    outer: bool = False
    members: "tuple[Unit, ...]" = ()

    @property
    def layers(self) -> "tuple[Unit, ...]":
        """The units of its layers: itself, or those that are tied in it."""
        return self.members or (self,)

    @property
    def kind(self) -> str:
        """Its path inside the block, the same for its siblings in other blocks: ``self_attn.q_proj``."""
        return self.name.split(f".{self.block}.", 1)[-1]

    @property
    def active(self) -> "Unit":
        """The unit with weights and costs as many as are active for one token: a share of those of experts."""
        share = self.columns.get(ACTIVE_SHARE, 1.0)
        levels = tuple(replace(level, cost=round(share * level.cost)) for level in self.levels)
        return self if share == 1 else replace(self, numel=max(1, round(share * self.numel)), levels=levels)

    @property
    def level_names(self) -> tuple[str, ...]:
        """Names of the ladder, cheapest first."""
        return tuple(level.name for level in self.levels)

    @property
    def only_drops(self) -> bool:
        """Whether all its levels are either to keep or to drop it."""
        return all(level.nominal is not None and level.nominal.kind == "kept" for level in self.levels)


def with_columns(units: Sequence[Unit], columns: Mapping[str, Mapping[str, float]]) -> tuple[Unit, ...]:
    """Return units with further columns, by the unit's name."""
    return tuple(replace(unit, columns={**unit.columns, **columns.get(unit.name, {})}) for unit in units)
