"""The plan of a search: how many generations, and the strategies that each of them uses."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from evosweep.core.checks import check_int
from evosweep.core.errors import SettingError
from evosweep.core.events import GenerationRecord
from evosweep.search.racing import Racing
from evosweep.search.selection_stages import Stages
from evosweep.search.stopping import Patience, StoppingRule, TokenLimit
from evosweep.search.surrogate import Screening
from evosweep.search.survival import Race, ScoreAll, Survival


@dataclass(frozen=True)
class Plan:
    """What a search does in each generation, and when it ends.

    Args:
        generations: Generations after the start.
        stages: Rounds of selection.
        survival: How a stage is scored.
        screening: Drops part of a generation before it is scored; None drops nobody.
        stopping: Rules that end the search early.
        final: Whether all elites are scored once more, on every search token, before the winner is named; a number is
            the most tokens to score each of them on.
    """

    generations: int
    stages: Stages
    survival: Survival = field(default_factory=ScoreAll)
    screening: Screening | None = None
    stopping: tuple[StoppingRule, ...] = ()
    final: bool | int = False

    @classmethod
    def of(
        cls,
        *,
        generations: object,
        stages: object,
        racing: Any = None,
        surrogate: Any = None,
        tokens: Any = None,
        patience: Any = None,
        final: object = False,
    ) -> "Plan":
        """Return the plan that settings describe, as a configuration holds them.

        Args:
            generations: Generations after the start, at least 0.
            stages: List of ``{survivors, tokens}``, survivors falling to 1.
            racing: Error level of races, or a survival rule of your own; None scores every candidate of a stage on all
                of its tokens.
            surrogate: Share of a generation that a model of the scores so far drops unscored; None drops nobody.
            tokens: No generation begins that would spend more in all; None sets no bound.
            patience: Generations without a new elite after which the search ends; None never does.
            final: As in the constructor.

        Raises:
            SettingError: A setting cannot be used.
        """
        count = check_int("generations", generations, low=0)
        rounds = Stages.of(stages)
        screening = None if surrogate is None else Screening(surrogate)
        stopping: list[StoppingRule] = []
        if tokens is not None:
            stopping.append(TokenLimit(tokens))
        if patience is not None:
            stopping.append(Patience(patience))
        return cls(count, rounds, _survival(racing), screening, tuple(stopping), _final(final))

    @property
    def tokens(self) -> int | None:
        """Tokens that end the search; None where they do not."""
        return next((rule.tokens for rule in self.stopping if isinstance(rule, TokenLimit)), None)

    @property
    def final_limit(self) -> int | None:
        """Most tokens that the final scoring takes for a genome; None: every search token."""
        return None if isinstance(self.final, bool) else self.final

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for one plan to continue a search that another began, as JSON.

        When the search ends, and how its winner is named, may change.
        """
        return {
            "stages": [[stage.survivors, stage.tokens] for stage in self.stages],
            "survival": repr(self.survival),
            "screening": repr(self.screening),
        }

    def stopped_by(self, records: Sequence[GenerationRecord]) -> str | None:
        """Return the reason why no generation should follow these; None if one should."""
        if not records:
            return None
        return next((rule.reason for rule in self.stopping if rule.stops(records)), None)


def _survival(racing: Any) -> Survival:
    if racing is None:
        return ScoreAll()
    if hasattr(racing, "run"):
        survival: Survival = racing
        return survival
    return Race(Racing(racing))


def _final(value: object) -> bool | int:
    if isinstance(value, bool):
        return value
    if not isinstance(value, int) or value < 1:
        raise SettingError("final", allowed="true, false or a number of tokens", got=value)
    return value
