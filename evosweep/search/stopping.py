"""Rules that end a search before its last generation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from evosweep.core.checks import check_int
from evosweep.core.events import GenerationRecord


class StoppingRule(Protocol):
    """Decides from what was recorded whether the next generation is run.

    Attributes:
        reason: One word that ``SearchResult.stopped`` reports.
    """

    reason: str

    def stops(self, records: Sequence[GenerationRecord]) -> bool:
        """Return whether the search ends after these generations; at least one is given."""


@dataclass(frozen=True)
class TokenLimit:
    """Ends a search whose next generation, if as large as the last one, would spend more than ``tokens`` in all.

    Args:
        tokens: Most tokens that the generations may score together, preparations included. What ``Plan.final`` scores
            comes on top.
    """

    tokens: int
    reason = "tokens"

    def __post_init__(self) -> None:
        check_int("tokens", self.tokens, low=1)

    def stops(self, records: Sequence[GenerationRecord]) -> bool:
        """Return whether another generation would go beyond the limit."""
        spent = records[-1].tokens
        last = spent - records[max(len(records) - 2, 0)].tokens
        return spent + last > self.tokens


@dataclass(frozen=True)
class Patience:
    """Ends a search whose elite has stayed the same for ``generations`` generations."""

    generations: int
    reason = "stagnation"

    def __post_init__(self) -> None:
        check_int("patience", self.generations, low=1)

    def stops(self, records: Sequence[GenerationRecord]) -> bool:
        """Return whether the last ``generations`` generations found no new elite."""
        unchanged = [record.changed == 0 for record in records[1:]]
        return len(unchanged) >= self.generations and all(unchanged[-self.generations :])
