"""An allocation: the level of every unit; immutable, hashable, JSON."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evosweep.core.errors import EvosweepError
from evosweep.core.files import digest, write_json


class Allocation(Mapping[str, str]):
    """An immutable, hashable map of unit name to level name."""

    __slots__ = ("_levels",)

    def __init__(self, levels: Mapping[str, str]) -> None:
        self._levels = dict(levels)

    @property
    def _items(self) -> tuple[tuple[str, str], ...]:
        """Its levels by name of the unit; not kept, since a search keeps an allocation a generation."""
        return tuple(sorted(self._levels.items()))

    def __getitem__(self, unit: str) -> str:
        return self._levels[unit]

    def __iter__(self) -> Iterator[str]:
        return iter(self._levels)

    def __len__(self) -> int:
        return len(self._levels)

    def __hash__(self) -> int:
        return hash(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Allocation) and self._levels == other._levels

    def __repr__(self) -> str:
        return f"Allocation({len(self)} units, {digest(self._items, length=8)})"

    @property
    def hash(self) -> str:
        """Content hash, the same in every process."""
        return digest(self._items)

    def save(self, path: Path, **facts: Any) -> Path:
        """Write allocation.json: ``facts`` beside the levels."""
        return write_json(path, {**facts, "allocation": self._levels})

    @classmethod
    def load(cls, path: Path) -> "Allocation":
        """Read what ``save`` wrote.

        Raises:
            EvosweepError: The file cannot be read or holds no allocation.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            return cls({str(unit): str(level) for unit, level in value["allocation"].items()})
        except OSError as error:
            raise EvosweepError(f"allocation file {path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvosweepError(f"{path} is not an allocation.json (a JSON object with 'allocation')") from error
