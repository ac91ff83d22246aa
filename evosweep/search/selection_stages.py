"""The stages of a generation: in each, fewer candidates go on and are scored on more tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from evosweep.core.checks import check_int
from evosweep.core.errors import SettingError

KEYS = {"survivors", "tokens"}
ALLOWED = "a list of {survivors: .., tokens: ..}"
QUOTE = "in a shell, quote the whole list: 'search.stages=[{survivors: 4, tokens: 512}, {survivors: 1, tokens: 2048}]'"


@dataclass(frozen=True)
class Stage:
    """One round of selection: every candidate is scored on ``tokens`` tokens, the best ``survivors`` go on."""

    survivors: int
    tokens: int


@dataclass(frozen=True)
class Stages:
    """The rounds of selection that each generation goes through, in order.

    Args:
        rounds: At least one; survivors never rise, and the last stage has one.

    Raises:
        SettingError: There is no stage, or survivors do not fall to 1.
    """

    rounds: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.rounds:
            raise SettingError("stages", allowed=ALLOWED, got=[])
        survivors = [stage.survivors for stage in self.rounds]
        if survivors != sorted(survivors, reverse=True) or survivors[-1] != 1:
            raise SettingError("stages", allowed="survivors that fall to 1 in the last stage", got=survivors)

    def tokens_of(self, candidates: int, *, parents: int) -> int:
        """Return the tokens that a generation is scored on at most, all candidates and stages together.

        Args:
            candidates: How many are proposed.
            parents: How many parents compete with them in the last stage.
        """
        total = 0
        alive = candidates
        for index, stage in enumerate(self.rounds):
            last = index == len(self.rounds) - 1
            alive += parents if last else 0
            if last or alive > stage.survivors:  # else nobody would be left behind, and nobody is scored
                total += alive * stage.tokens
                alive = min(alive, stage.survivors)
        return total if candidates + parents > 1 else 0

    @classmethod
    def of(cls, value: object) -> "Stages":
        """Return the stages that a list of mappings describes, as a configuration holds it.

        Raises:
            SettingError: It is no such list; names the stage and its key.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            hint = QUOTE if isinstance(value, str) else ""
            raise SettingError("stages", allowed=ALLOWED, got=value, hint=hint)
        return cls(tuple(_stage(index, stage) for index, stage in enumerate(value)))

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.rounds)

    def __len__(self) -> int:
        return len(self.rounds)

    def __getitem__(self, index: int) -> Stage:
        return self.rounds[index]


def _stage(index: int, value: object) -> Stage:
    """Return one stage, or raise the error that names it."""
    if isinstance(value, Stage):
        value = {"survivors": value.survivors, "tokens": value.tokens}
    setting = f"stages[{index}]"
    if not isinstance(value, Mapping):
        raise SettingError(setting, allowed="{survivors: .., tokens: ..}", got=value, hint=QUOTE)
    if set(value) != KEYS:
        raise SettingError(setting, allowed="{survivors: .., tokens: ..}", got=dict(value))
    return Stage(
        survivors=check_int(f"{setting}.survivors", value["survivors"], low=1),
        tokens=check_int(f"{setting}.tokens", value["tokens"], low=1),
    )
