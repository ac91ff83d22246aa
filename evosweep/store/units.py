"""Which parts outside of the blocks are units: the embedding and the head, each with levels of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evosweep.compressors.base import Compressor, LevelSpec, identity
from evosweep.core.errors import SettingError
from evosweep.models.anatomy import Anatomy
from evosweep.store.statistics.base import check_needs, statistic_module


@dataclass(frozen=True)
class Units:
    """What is a unit beside the layers of the blocks.

    Attributes:
        embedding: Makes the levels of the token embedding; None: it is no unit. Where head and embedding are one
            tensor, its levels serve as both.
        head: Makes the levels of the output matrix, where that is a tensor of its own; None: it is no unit.
    """

    embedding: Compressor | None = None
    head: Compressor | None = None

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
